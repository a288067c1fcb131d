"""`condu ablate` as a user has it: what it prints, writes and refuses."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from tiny_run import tiny_benchmark, tiny_clip, tiny_config, tiny_trainer
from typer.testing import CliRunner, Result

from condu import trainer
from condu.ablation import study
from condu.ablation.tables import markdown, table
from condu.cli import app
from condu.models.clip import ClipModel
from condu.runfolder import RunFolder
from condu.weights import load_weights, save_weights


@pytest.fixture(autouse=True)
def _tiny(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(
        trainer,
        "make_benchmark",
        lambda config: tiny_benchmark().subset(config.benchmark.tasks or 2),
    )
    monkeypatch.setattr(trainer, "load_model", lambda name, pretrained: tiny_clip())
    monkeypatch.chdir(tmp_path)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("runs") / "run"
    tiny_trainer(out, methods=["individual"], training={"steps": 2}).run()
    return out


@pytest.fixture
def run(finished: Path, tmp_path: Path) -> Path:
    """A copy that a test may spoil."""
    return Path(shutil.copytree(finished, tmp_path / "run"))


def condu(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def refused(run: Path, *options: object) -> str:
    """The one line of an ablation that ended before anything was computed or written."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(study, "_measure", None)
        result = condu("ablate", run, *options)
    assert result.exit_code == 2, result.output
    assert result.stdout == ""
    assert not (run / "ablation").exists()
    (line,) = result.stderr.splitlines()
    assert line.startswith("error: ")
    return line


def test_it_prints_the_table_and_leaves_the_run_as_it_was(run: Path) -> None:
    before = {file: file.read_bytes() for file in run.rglob("*") if file.is_file()}
    result = condu("ablate", run)
    assert result.exit_code == 0, result.output
    lines = [line.strip() for line in result.stdout.splitlines()]
    assert any(line.startswith("fusion, no masks: Last task-id") for line in lines)
    for title in ("fusion", "16-bit checkpoints", "voting", "prototypes"):
        assert title in lines
    (default,) = (line for line in lines if line.startswith("condu "))
    assert "+" not in default
    (masks,) = (line for line in lines if line.startswith("no masks "))
    assert masks.count("+") + masks.count("-") == 5
    assert any(line.startswith("exact ties among") for line in lines)
    assert all(file.read_bytes() == content for file, content in before.items())
    assert {f.name for f in (run / "ablation").iterdir()} == {"ablation.json", "ablation.md"}


def test_the_files_hold_what_is_printed(run: Path) -> None:
    result = condu("ablate", run, "--last", "--json", "-o", "elsewhere/here")
    assert result.exit_code == 0, result.output
    printed = json.loads(result.stdout)
    assert printed == json.loads(Path("elsewhere/here/ablation.json").read_text())
    assert Path("elsewhere/here/ablation.md").read_text() == markdown(printed)
    assert not (run / "ablation").exists()
    assert printed["configuration"] == tiny_config(
        methods=["individual"], training={"steps": 2}
    ).model_dump(mode="json")


def test_quiet_prints_the_table_alone(run: Path) -> None:
    result = condu("ablate", run, "--last", "--quiet")
    assert result.exit_code == 0, result.output
    assert "Last task-id" not in result.stdout
    assert "results:" not in result.stdout
    assert "no masks" in result.stdout


def test_an_old_result_is_replaced(run: Path) -> None:
    (run / "ablation").mkdir()
    (run / "ablation" / "ablation.json").write_text("{}")
    assert condu("ablate", run, "--last", "--quiet").exit_code == 0
    assert "rows" in json.loads((run / "ablation" / "ablation.json").read_text())


# Tables


def variant(name: str, group: str, last: float, half: bool = False) -> dict[str, object]:
    of_protocol = {"transfer": None, "average": last - 10, "last": last}
    return {
        "group": group,
        "name": name,
        "ties": 0.0525 if half else 0.0,
        "settings": {"half": half},
        "protocols": {"task-id": of_protocol, "agnostic": of_protocol},
    }


def test_a_table_by_hand() -> None:
    rows = [
        variant("condu", "default", 67.84),
        variant("no masks", "fusion", 40.0),
        variant("mean of all", "fusion", 67.81),
        variant("ties zero", "16-bit", 68.9, half=True),
    ]
    results = {"benchmark": "mini", "tasks": ["a", "b"], "seed": 1, "rows": rows}
    lines = markdown(results).splitlines()
    assert lines[2:6] == [
        "| default | condu | 57.8 | 67.8 | 57.8 | 67.8 |",
        "| fusion | no masks | -27.8 | -27.8 | -27.8 | -27.8 |",
        "|  | mean of all | +0.0 | +0.0 | +0.0 | +0.0 |",
        "| 16-bit | ties zero | +1.1 | +1.1 | +1.1 | +1.1 |",
    ]
    assert "Transfer" not in lines[0]  # not measured
    assert "0.0000 % as fine-tuned, 5.25 % as 16-bit checkpoints" in lines[-1]
    assert table(results).row_count == len(rows) + 4  # two titles, each after an empty line


def test_one_task_has_no_transfer_and_no_ties(tmp_path: Path) -> None:
    config = {"benchmark": {"tasks": 1}, "methods": ["condu"], "training": {"steps": 1}}
    trained = tiny_trainer(tmp_path / "one", **config)
    trained.benchmark = trained.benchmark.subset(1)
    trained.run()
    result = condu("ablate", "one", "--json")
    assert result.exit_code == 0, result.output
    rows = json.loads(result.stdout)["rows"]
    assert {row["ties"] for row in rows} == {None}
    assert not [row for row in rows if row["name"].startswith("K = ")]
    assert condu("ablate", "one", "--quiet").exit_code == 0


# What is refused


def test_a_folder_that_is_no_run_is_named(tmp_path: Path) -> None:
    assert "nowhere is not the folder of a run" in refused(Path("nowhere"))


def test_a_file_in_the_place_of_the_results_is_refused_first(run: Path) -> None:
    Path("taken").write_text("")
    assert "--out: taken is not a folder" in refused(run, "-o", "taken")


def test_a_run_without_models_of_all_weights_says_which_methods_leave_them() -> None:
    tiny_trainer(Path("lora"), methods=["condu_lora"], lora={"steps": 1}).run()
    line = refused(Path("lora"))
    assert "lora/finetuned/000.safetensors is missing" in line
    assert "'hues'" in line
    assert "as the methods condu and individual leave them; this run (condu_lora)" in line


def test_a_run_that_has_not_come_so_far_names_the_task(run: Path) -> None:
    (run / "finetuned" / "001.safetensors").unlink()
    line = refused(run)
    assert "run/finetuned/001.safetensors is missing, the model fine-tuned on task 'tones'" in line
    assert "--resume" in line


def spoil(change: Callable[[dict[str, torch.Tensor]], object]) -> Callable[[Path], None]:
    def spoilt(file: Path) -> None:
        weights = load_weights(file)
        change(weights)
        save_weights(file, weights, task="tones", seconds="1", loss="1")

    return spoilt


def swap(file: Path) -> None:
    shutil.copy(file.with_name("000.safetensors"), file)


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (swap, "001.safetensors was fine-tuned on task 'hues', not on 'tones'"),
        (lambda file: file.write_bytes(b"{"), "001.safetensors is not a readable safetensors"),
        (
            spoil(lambda w: w.update(logit_scale=torch.ones(3))),
            "tensor 'logit_scale': shape [3] in the file, shape [] in the model",
        ),
        (spoil(lambda w: w.pop("visual.proj")), "tensor 'visual.proj': none in the file, shape"),
        (
            spoil(lambda w: w.update(more=torch.ones(2))),
            "tensor 'more': shape [2] in the file, none in the model",
        ),
    ],
    ids=["another task", "no safetensors", "another shape", "one less", "one more"],
)
def test_a_model_that_is_not_the_runs_is_named(
    run: Path, change: Callable[[Path], object], expected: str
) -> None:
    change(run / "finetuned" / "001.safetensors")
    assert expected in refused(run)


def test_a_model_that_cannot_vote_is_refused(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ClipModel, "votes", False)
    assert "for which it takes a CLIP model, got 'tiny'" in refused(run)


def test_values_that_are_not_finite_are_refused(run: Path) -> None:
    file = run / "finetuned" / "001.safetensors"
    spoil(lambda w: w["visual.proj"].fill_(float("nan")))(file)
    result = condu("ablate", run, "--quiet")
    assert result.exit_code == 2
    assert "task 'tones', tensor 'visual.proj'" in result.stderr
    assert not (run / "ablation").exists()


def test_a_wrong_configuration_is_named(run: Path) -> None:
    RunFolder(run).config_file.write_text("training: {stepz: 3}")
    assert "unknown key 'training.stepz'" in refused(run)
