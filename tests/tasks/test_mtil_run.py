"""`benchmark: {name: mtil, …}`: from a configuration to the accuracies of a run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import mtil_folders
import pytest
import torch
from small_clip import small_clip

from condu import trainer
from condu.config import ConfigError, difference, load_config, make_config
from condu.tasks.configured import make_benchmark
from condu.tasks.mtil import ORDERS
from condu.tasks.mtil.tasks import mtil_benchmark
from condu.trainer import ContinualTrainer

pytestmark = pytest.mark.filterwarnings("ignore:.*published numbers")


def config(root: Path, **changes: Any) -> dict[str, Any]:
    return {
        "benchmark": {"name": "mtil", "root": str(root), **changes},
        "methods": ["zero_shot", "condu"],
        "training": {"steps": 30, "batch_size": 12, "lr": 3e-3},
    }


def test_a_run_trains_on_data_sets_on_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = mtil_folders.write(tmp_path / "data", "StanfordCars", "Food101", monkeypatch=monkeypatch)
    monkeypatch.setattr(trainer, "load_model", small_clip)
    chosen = make_config(config(data, order="II", tasks=2, shots=5, workers=1))
    results = ContinualTrainer.from_config(chosen, tmp_path / "run").run()
    assert (results["benchmark"], results["tasks"]) == ("mtil", ["StanfordCars", "Food101"])
    untrained, *_ = results["methods"]["zero_shot"]["protocols"]["task-id"]["matrix"]
    matrix = results["methods"]["condu"]["protocols"]["task-id"]["matrix"]
    assert matrix[0][0] > untrained[0] + 20
    assert matrix[1][1] > untrained[1] + 20
    assert load_config(tmp_path / "run" / "config.yaml") == chosen


def test_workers_read_the_batches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = mtil_folders.write(tmp_path / "data", "DTD", monkeypatch=monkeypatch)
    monkeypatch.setattr(trainer, "load_model", small_clip)
    order = ["DTD", *(name for name in ORDERS["I"] if name != "DTD")]
    values = config(data, order=order, tasks=1, workers=2)
    values |= {"methods": ["individual"], "training": {"steps": 2, "batch_size": 4}}
    asked: list[int] = []
    loader = torch.utils.data.DataLoader.__init__

    def init(self: Any, *arguments: Any, **options: Any) -> None:
        asked.append(options.get("num_workers", 0))
        loader(self, *arguments, **options)

    monkeypatch.setattr(torch.utils.data.DataLoader, "__init__", init)
    ContinualTrainer.from_config(make_config(values), tmp_path / "run").run()
    assert asked
    assert set(asked) == {2}


@pytest.mark.parametrize("order", ["I", "II"])
def test_an_order_by_name_is_the_list_of_its_data_sets(tmp_path: Path, order: str) -> None:
    named = make_config(config(tmp_path, order=order))
    assert named.benchmark.order == ORDERS[order]
    assert difference(named, make_config(config(tmp_path, order=ORDERS[order]))) is None


def test_a_run_may_go_on_with_its_data_elsewhere(tmp_path: Path) -> None:
    begun = make_config(config(tmp_path / "here", download=True))
    assert difference(begun, make_config(config(tmp_path / "there"))) is None
    fewer = make_config(config(tmp_path / "here", download=True, shots=5))
    assert difference(begun, fewer) == "benchmark.shots was None and is now 5"


def test_few_shot_subsets_are_those_of_the_configured_seed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mtil_folders.write(tmp_path, "Aircraft", monkeypatch=monkeypatch)
    (found,) = make_benchmark(make_config(config(tmp_path, tasks=1, shots=5, seed=3)))
    (expected,) = mtil_benchmark(tmp_path, ["Aircraft"], shots=5, seed=3)
    assert len(found.load("train")) == 15
    assert found.load("train").files == expected.load("train").files


def test_only_what_is_used_has_to_be_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mtil_folders.write(tmp_path, "Aircraft", monkeypatch=monkeypatch)
    benchmark = make_benchmark(make_config(config(tmp_path, tasks=1)))
    assert [task.name for task in benchmark] == ["Aircraft"]
    assert benchmark.workers == 4
    with pytest.raises(ValueError, match=r"Caltech101: .* is missing; unpack"):
        make_benchmark(make_config(config(tmp_path, tasks=2)))


@pytest.mark.parametrize(
    ("wanted", "expected"),
    [
        ({"name": "mtil"}, "benchmark: 'mtil' needs root"),
        ({"root": "x"}, "benchmark: root is for 'mtil' and 'folders' only, got 'x' for 'mini'"),
        ({"shots": 5}, "benchmark: shots is for 'mtil' and 'folders' only, got 5 for 'mini'"),
        ({"workers": 0}, "benchmark: workers is for 'mtil' and 'folders' only, got 0 for 'mini'"),
        ({"name": "mtil", "root": "x", "shots": 7}, r"benchmark.shots: .*5 or 16, got 7"),
        ({"name": "mtil", "root": "x", "order": "III"}, r"benchmark.order: .*I or II, got 'III'"),
        ({"order": "I"}, "benchmark.order: must be a list of task names"),
        ({"name": "mtil", "root": "x", "workers": -1}, "benchmark.workers: .*got -1"),
    ],
)
def test_wrong_values_are_named(wanted: dict[str, Any], expected: str) -> None:
    with pytest.raises(ConfigError, match=expected) as error:
        make_config({"benchmark": wanted})
    assert ";" not in str(error.value)


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"order": ["DTD", "DTD"]}, "benchmark.order: 'DTD' is listed twice"),
        ({"order": ["DTD"], "tasks": 2}, "benchmark.tasks: got 2, but there are 1 tasks"),
        ({"order": ["dtd"]}, "benchmark.order: benchmark 'mtil' has no task 'dtd', there are: Air"),
        ({"tasks": 12}, "benchmark.tasks: got 12, but there are 11 tasks"),
    ],
)
def test_tasks_that_there_are_not_are_named(
    tmp_path: Path, changes: dict[str, Any], expected: str
) -> None:
    with pytest.raises(ConfigError, match=expected):
        make_benchmark(make_config(config(tmp_path, **changes)))


def test_several_processes_do_not_download(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ConfigError, match=r"benchmark\.download: only a single process"):
        make_benchmark(make_config(config(tmp_path, download=True)))
