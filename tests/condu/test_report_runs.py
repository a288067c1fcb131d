"""Which runs a report puts together, and what it reads from them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from written_run import TASKS, results, write_run

from condu.report.comparing import published_elsewhere, published_for
from condu.report.gathering import ReportError, differences, gather
from condu.report.published import MTIL, MTIL_AGNOSTIC, MTIL_FIVE_SHOT, TABLES
from condu.report.spread import Spread
from condu.runfolder import RunFolderError
from condu.tasks.mtil import ORDERS


def run(folder: Path, **changes: Any) -> Path:
    return write_run(folder, results(**changes), features=None)


def test_a_spread_is_of_what_was_measured() -> None:
    assert Spread.of([1.0, None, 4.0, 2.5]) == Spread(2.5, 1.0, 4.0, 3)
    assert Spread.of([None]) is None
    assert Spread.of([]) is None


def test_a_spread_in_words() -> None:
    def number(value: float) -> str:
        return f"{value:.1f}"

    assert Spread(2.5, 1, 4, 3).text(number) == "2.5 (1.0–4.0)"
    assert Spread(-2.5, -4, -1, 3).text(number) == "-2.5 (-4.0 to -1.0)"
    assert Spread(2.5, 2.5, 2.5, 1).text(number) == "2.5"


def test_runs_that_differ_in_the_seed_are_one_experiment(tmp_path: Path) -> None:
    folders = [run(tmp_path / str(seed), seed=seed) for seed in (7, 3, 5)]
    (experiment,) = gather(folders)
    assert experiment.label == ""
    assert experiment.seeds == (3, 5, 7)
    last = [
        results(seed=seed)["methods"]["condu"]["protocols"]["agnostic"]["last"]
        for seed in (3, 5, 7)
    ]
    spread = experiment.metric("condu", "agnostic", "last")
    assert spread is not None
    assert spread.mean == pytest.approx(sum(last) / 3)
    assert (spread.least, spread.greatest, spread.count) == (min(last), max(last), 3)
    assert differences([experiment]) == {}


def test_where_the_data_are_is_no_difference(tmp_path: Path) -> None:
    wanted = {"benchmark": "mtil", "tasks": ORDERS["I"][:2], "methods": ("zero_shot",)}
    here = run(tmp_path / "a", seed=1, **wanted)
    found = results(seed=2, **wanted)
    found["configuration"]["benchmark"]["root"] = "elsewhere"
    there = write_run(tmp_path / "b", found, features=None)
    assert len(gather([here, there])) == 1


def of_folders(folder: Path, root: str, *, seed: int, first: str = "a tit") -> Path:
    found = results(tasks=("birds", "tools"), methods=("zero_shot",), seed=seed)
    found["benchmark"] = "folders"
    found["configuration"]["benchmark"] |= {"name": "folders", "root": root}
    found["classes"]["birds"][0] = first
    return write_run(folder, found, features=None)


def test_other_folders_of_images_are_other_data(tmp_path: Path) -> None:
    ours = of_folders(tmp_path / "a", "data/own", seed=1)
    theirs = of_folders(tmp_path / "b", "data/other", seed=1)
    again = of_folders(tmp_path / "c", "./data/own/", seed=2)
    one, two = gather([ours, theirs, again])
    assert (one.seeds, two.seeds) == ((1, 2), (1,))
    assert differences([one, two]) == {"benchmark.root": ["data/own", "data/other"]}


def test_other_classes_of_a_task_are_refused(tmp_path: Path) -> None:
    ours = of_folders(tmp_path / "a", "data", seed=1)
    theirs = of_folders(tmp_path / "b", "data", seed=2, first="a magpie")
    with pytest.raises(ReportError, match=r"task 'birds' .* a tit, .*in .*/a, a magpie, .*in .*/b"):
        gather([ours, theirs])


def test_other_settings_are_other_experiments_with_what_differs(tmp_path: Path) -> None:
    folders = [
        run(tmp_path / "a", seed=1),
        run(tmp_path / "b", seed=1, fusion={"rescale": "tensor_mean"}),
        run(tmp_path / "c", seed=2),
    ]
    one, two = gather(folders)
    assert (one.label, one.seeds, two.label, two.seeds) == ("A", (1, 2), "B", (1,))
    assert one.title("condu") == "condu · A"
    assert differences([one, two]) == {"fusion.rescale": ["global", "tensor_mean"]}


def test_the_same_measurement_twice_is_refused(tmp_path: Path) -> None:
    folders = [run(tmp_path / name, seed=4) for name in ("a", "b")]
    with pytest.raises(ReportError, match=r"a and .*b have the same .* seed, 4"):
        gather(folders)


def test_other_tasks_and_other_benchmarks_are_refused(tmp_path: Path) -> None:
    ours = run(tmp_path / "a")
    fewer = run(tmp_path / "b", tasks=TASKS[:2], seed=1)
    with pytest.raises(ReportError, match=r"has tasks hues, tones, shapes, strokes, .*b has hues"):
        gather([ours, fewer])
    mtil = run(tmp_path / "c", benchmark="mtil", seed=1)
    with pytest.raises(ReportError, match=r"has benchmark mini, .*c has mtil"):
        gather([ours, mtil])


def test_an_unfinished_run_and_an_older_format_are_refused(tmp_path: Path) -> None:
    finished = run(tmp_path / "a")
    begun = tmp_path / "begun"
    begun.mkdir()
    (begun / "config.yaml").write_text("seed: 1\n")
    with pytest.raises(RunFolderError, match="begun has not finished"):
        gather([finished, begun])
    old = write_run(tmp_path / "old", {**results(), "format": 1}, features=None)
    with pytest.raises(RunFolderError, match="format"):
        gather([old])


def test_votes_are_shares_of_each_data_set_in_the_end(tmp_path: Path) -> None:
    found = results(tasks=("a", "b"), methods=("condu", "zero_shot"))
    found["methods"]["condu"]["protocols"]["agnostic"]["votes"] = [
        [[10], [8]],
        [[30, 10], [0, 8]],
    ]
    (experiment,) = gather([write_run(tmp_path / "a", found, features=None)])
    assert experiment.votes("condu", "agnostic") == [[75, 25], [0, 100]]
    assert experiment.votes("zero_shot", "task-id") is None


def test_facts_of_sessions(tmp_path: Path) -> None:
    found = results(tasks=("a", "b"), methods=("condu", "pam"))
    sessions = found["methods"]["condu"]["sessions"]
    sessions[0]["peak_bytes"]["fuse"] = {"host": 5, "device": 80}
    sessions[1]["peak_bytes"]["fuse"] = {"host": 9, "device": None}
    sessions[1]["fused"]["tasks"]["a"]["cosine"] = None
    found["methods"]["pam"]["sessions"][1]["misaligned"] = 0.25
    (experiment,) = gather([write_run(tmp_path / "a", found, features=None)])
    assert experiment.peak_bytes("condu", "fuse", "host") == Spread.of([9])
    assert experiment.peak_bytes("condu", "fuse", "device") == Spread.of([80])
    assert experiment.peak_bytes("condu", "train", "device") is None
    for session in found["methods"]["pam"]["sessions"]:
        session["peak_bytes"]["fuse"] = None
    (experiment,) = gather([write_run(tmp_path / "b", found, features=None)])
    assert experiment.peak_bytes("pam", "fuse", "host") is None
    assert experiment.misaligned("pam") == Spread.of([25])
    assert experiment.misaligned("condu") is None
    densities = experiment.fused("condu", "density")
    assert {task: [session for session, _ in points] for task, points in densities.items()} == {
        "a": [0, 1],
        "b": [1],
    }
    assert [session for session, _ in experiment.fused("condu", "cosine")["a"]] == [0]
    assert experiment.fused("pam", "density") == {}
    assert experiment.fused_bytes("condu") == Spread.of([sessions[1]["fused"]["bytes"]])


@pytest.mark.parametrize(
    ("changes", "beside"),
    [
        ({}, [MTIL, MTIL_AGNOSTIC]),
        ({"benchmark": {"root": "data", "shots": 5}}, [MTIL_FIVE_SHOT]),
        ({"benchmark": {"root": "data", "shots": 16}}, []),
        ({"tasks": ORDERS["II"]}, []),
        ({"tasks": ORDERS["I"][:5]}, []),
    ],
)
def test_published_tables_stand_beside_runs_that_were_measured_alike(
    tmp_path: Path, changes: dict[str, Any], beside: list[object]
) -> None:
    settings = dict(changes)
    found = results(tasks=settings.pop("tasks", ORDERS["I"]), methods=("condu",), seed=1)
    found["benchmark"] = "mtil"
    wanted = {"name": "mtil", "root": "data", **settings.pop("benchmark", {})}
    found["configuration"]["benchmark"] |= wanted
    experiments = gather([write_run(tmp_path / "a", found, features=None)])
    shown = [
        table for name in ("task-id", "agnostic") for table in published_for(experiments, name)
    ]
    assert shown == beside
    assert published_elsewhere(experiments) == [table for table in TABLES if table not in beside]
