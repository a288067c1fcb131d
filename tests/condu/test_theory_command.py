"""`condu theory` on the tiny benchmark, two tasks a seed."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from matplotlib.backends.backend_svg import FigureCanvasSVG
from safetensors.torch import load_file
from tiny_run import tiny_benchmark, tiny_clip, tiny_config, tiny_trainer
from typer.testing import CliRunner, Result

from condu import tuning
from condu.cli import app
from condu.theory.finetunings import fine_tuning_of
from condu.theory.plots import SHARES, _change, _flips
from condu.theory.tables import tables
from condu.trainer import ContinualTrainer
from condu.weights import load_weights

PICTURES = ("repetition.svg", "flips.svg", "change.svg")


@pytest.fixture(autouse=True)
def _tiny(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Every command works on the tiny benchmark, in a folder of its own."""
    make = ContinualTrainer

    def tiny(config: Any, out: Path) -> ContinualTrainer:
        return make(tiny_clip(), tiny_benchmark(), config, out)

    monkeypatch.setattr(ContinualTrainer, "from_config", tiny)
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def trained(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of tasks and seeds in the order in which they were fine-tuned."""
    names: list[str] = []
    finetune = tuning.finetune

    def counted(live: Any, task: Any, *arguments: Any, seed: int, **options: Any) -> float:
        names.append(f"{task.name}, seed {seed}")
        return finetune(live, task, *arguments, seed=seed, **options)

    monkeypatch.setattr(tuning, "finetune", counted)
    return names


def theory(*arguments: object) -> Result:
    words = [str(argument) for argument in arguments]
    return CliRunner().invoke(app, ["theory", *words, "--iterations", "5"])


def run(name: str, **changes: Any) -> Path:
    changes = {"methods": ["individual"], "training": {"steps": 2}, **changes}
    tiny_trainer(Path(name), **changes).run()
    return Path(name)


def refused(result: Result) -> str:
    """The one line that the command wrote before it ended with status 2."""
    assert result.exit_code == 2, result.output
    assert result.stdout == ""
    (line,) = result.stderr.splitlines()
    return line


def found(folder: Path | str) -> dict[str, Any]:
    record = json.loads((Path(folder) / "theory.json").read_text())
    record.pop("seconds")
    return record


def test_tables_record_and_pictures(trained: list[str]) -> None:
    result = theory("--tasks", 3, "--steps", 2)
    assert result.exit_code == 0, result.output
    assert trained == ["hues, seed 42", "tones, seed 42", "hues, seed 43"]
    for words in ("Theorem F.3", "Corollary F.6: task n joins, random", "runs/theory/theory.json"):
        assert words in result.stdout
    record = found("runs/theory")
    assert record["models"] == trained
    trainable = {
        name for name, parameter in tiny_clip().model.named_parameters() if name != "logit_scale"
    }
    weights = load_weights(Path("runs/theory/seed-42/finetuned/000.safetensors"))
    assert record["elements"] == sum(weights[name].numel() for name in trainable)
    for kind in ("fine-tuned", "random"):
        measured = record["deltas"][kind]
        assert [row["tasks"] for row in measured["repetition"]] == [2, 3]
        assert [row["tasks"] for row in measured["joining"]] == [2, 3]
        for row in measured["repetition"]:
            assert row["changes"][0][0] == 1
            assert row["changes"][-1][0] == row["iterations"] <= 5
    for name in PICTURES:
        assert "<svg" in (Path("runs/theory") / name).read_text()


def test_a_second_call_trains_only_what_is_not_there(trained: list[str]) -> None:
    assert theory("--tasks", 3, "--steps", 2).exit_code == 0
    first = found("runs/theory")
    trained.clear()
    Path("runs/theory/seed-42/finetuned/001.safetensors").unlink()
    result = theory("--tasks", 3, "--steps", 2, "--json")
    assert trained == ["tones, seed 42"]
    assert found("runs/theory") == first
    printed = json.loads(result.stdout)  # and nothing but it
    printed.pop("seconds")
    assert printed == first
    trained.clear()
    assert theory("--tasks", 4, "--steps", 2).exit_code == 0
    assert trained == ["tones, seed 43"]


def test_models_of_runs_come_first(trained: list[str]) -> None:
    runs = [run("a", seed=42), run("b", seed=43)]
    trained.clear()
    before = {file: file.read_bytes() for file in Path("a").rglob("*") if file.is_file()}
    result = theory(*runs, "--tasks", 5)
    assert result.exit_code == 0, result.output
    assert trained == ["hues, seed 44"]
    assert "5 models: 4 there, 1 to be fine-tuned, which takes" in result.stdout
    seeds = [42, 42, 43, 43, 44]
    names = ["hues", "tones", "hues", "tones", "hues"]
    expected = [f"{name}, seed {seed}" for name, seed in zip(names, seeds, strict=True)]
    assert found("a/theory")["models"] == expected
    assert all(file.read_bytes() == content for file, content in before.items())


def test_of_runs_their_models_are_all_unless_more_are_asked_for(trained: list[str]) -> None:
    runs = [run("a", seed=42), run("b", seed=43)]
    trained.clear()
    result = theory(*runs)
    assert result.exit_code == 0, result.output
    assert trained == []
    assert found("a/theory")["tasks"] == 4
    assert "to be fine-tuned" not in result.stdout


def test_a_run_over_other_weights_is_refused() -> None:
    folder = run("a", seed=42)
    file = Path(folder, "progress.json")
    progress = json.loads(file.read_text())
    progress["basis"]["pretrained"] = "0123456789abcdef"
    file.write_text(json.dumps(progress))
    result = theory(folder)
    assert result.exit_code == 2
    assert "the pretrained weights are others now" in result.stderr


def test_what_is_to_be_fine_tuned_is_said_first(monkeypatch: pytest.MonkeyPatch) -> None:
    finetune, count = tuning.finetune, 0

    def interrupted(*arguments: Any, **options: Any) -> float:
        nonlocal count
        count += 1
        if count >= 3:
            raise KeyboardInterrupt
        return finetune(*arguments, **options)

    monkeypatch.setattr(tuning, "finetune", interrupted)
    lines = [theory("--steps", 2, "--out", "here").stdout.splitlines()[0] for _ in range(2)]
    model, *_ = Path("here").rglob("*.safetensors")
    size = sum(tensor.nbytes for tensor in load_file(model).values())
    for line, there in zip(lines, (0, 2), strict=True):
        start = f"50 models: {there} there, {50 - there} to be fine-tuned, which takes "
        assert line.startswith(start)
        number, unit = line.removeprefix(start).split()[:2]
        expected = (50 - there) * size / {"kB": 1e3, "MB": 1e6}[unit]
        assert float(number) == pytest.approx(expected, abs=0.051)
        assert line.endswith(" in here")


@pytest.mark.parametrize("last", [3, 11, 23, 51])
def test_axes_of_tasks_mark_whole_numbers_and_the_last(last: int) -> None:
    rows = [
        {"tasks": n, "delta_change": 1 / n, **dict.fromkeys(SHARES, 1 / n)}
        for n in range(2, last + 1)
    ]
    deltas = {"random": {"joining": rows, "decay": None}}
    for figure in (_flips(deltas), _change(deltas)):
        FigureCanvasSVG(figure).draw()
        (axes,) = figure.axes
        labels = [
            tick.get_text() for tick in axes.get_xticklabels() + axes.get_xticklabels(minor=True)
        ]
        assert labels[-1] == str(last)
        numbers = [int(label) for label in labels]
        assert numbers == sorted(set(numbers))
        assert len(numbers) > 1
        boxes = [tick.get_window_extent() for tick in axes.get_xticklabels()]
        assert all(left.x1 < right.x0 for left, right in pairwise(boxes))


@pytest.mark.parametrize(
    ("last", "shown"), [(6, ["2", "3", "4", "5", "6"]), (12, ["2", "5", "10", "12"])]
)
def test_the_table_has_every_task_where_there_are_few(last: int, shown: list[str]) -> None:
    keys = (*SHARES, "delta_change")
    rows = [{"tasks": n, **dict.fromkeys(keys, 0.5)} for n in range(2, last + 1)]
    record = {"deltas": {"random": {"repetition": [], "joining": rows, "decay": None}}}
    _, table = tables(record)
    assert list(table.columns[0].cells) == shown


def test_the_last_point_of_a_line_has_a_marker() -> None:
    changes = [0.5, 0.25, 0.125, 0.0625, 0.0]  # of which no logarithm is drawn
    rows = [
        {"tasks": n, "delta_change": change, **dict.fromkeys(SHARES, change)}
        for n, change in enumerate(changes, start=2)
    ]
    (axes,) = _change({"random": {"joining": rows, "decay": None}}).axes
    marked = [line.get_xydata().tolist() for line in axes.lines if line.get_marker() == "o"]
    assert marked[1:] == [[[5, 6.25]]]  # the first is the line


def test_interrupted_it_says_how_to_go_on(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(tuning, "finetune", interrupt)
    result = theory("--out", "here")
    assert result.exit_code == 130
    assert "--out here" in result.stderr
    assert not Path("here/theory.json").exists()


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (("--tasks", 1), "tasks: must be at least 2, for one has nothing to meet, got 1"),
        (("--steps", 0), "theory: training.steps: input should be greater than or equal to 1"),
        (("nowhere",), "nowhere is not the folder of a run: there is no config.yaml in it"),
        (("nowhere", "--steps", 3), "--steps 3: the steps are those of nowhere"),
        (("--out", "full"), "full holds something else"),
        (("--out", "begun"), "training.steps was 7 and is now 100"),
    ],
)
def test_bad_input_is_one_line_before_any_training(
    arguments: tuple[object, ...], expected: str, trained: list[str]
) -> None:
    Path("full").mkdir()
    Path("full/letters.txt").write_text("mine")
    Path("begun").mkdir()
    begun = fine_tuning_of(tiny_config(training={"steps": 7, "batch_size": 64, "lr": 1e-4}))
    Path("begun/config.yaml").write_text(begun.to_yaml())
    assert expected in refused(theory(*arguments))
    assert trained == []
    assert [file.name for file in Path("full").iterdir()] == ["letters.txt"]


def test_no_iteration_is_refused() -> None:
    result = CliRunner().invoke(app, ["theory", "--iterations", "0"])
    assert "iterations: must be at least 1, got 0" in refused(result)


def test_runs_that_do_not_belong_together_are_refused(trained: list[str]) -> None:
    a, again, other = run("a"), run("again"), run("other", training={"steps": 3})
    lacking = run("lacking", seed=43, methods=["zero_shot"])
    trained.clear()
    assert "a and again have the seed 42" in refused(theory(a, again))
    line = refused(theory(a, other))
    assert "a and other were fine-tuned differently: training.steps was 2 and is now 3" in line
    line = refused(theory(a, lacking, "--tasks", 3))
    assert "lacking has no model fine-tuned with all weights on task 'hues'" in line
    assert trained == []
