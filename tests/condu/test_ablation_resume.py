"""`condu ablate` after an interruption: what was measured is kept, and used where it holds."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from tiny_run import tiny_benchmark, tiny_clip, tiny_trainer
from typer.testing import CliRunner, Result

from condu import trainer
from condu.ablation import ablate, study
from condu.ablation.ground import Ground
from condu.cli import app
from condu.config import load_config, make_config
from condu.runfolder import RunFolder
from condu.weights import load_facts, load_weights, save_weights

FUSIONS = 12
"""Which share no experts: the default, 8 of the group "fusion", 3 of 16 bits."""

UNFINISHED = "ablation-unfinished-last.json"


@pytest.fixture(autouse=True, scope="module")
def _tiny() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trainer, "make_benchmark", lambda config: tiny_benchmark())
        patch.setattr(trainer, "load_model", lambda name, pretrained: tiny_clip())
        yield


@pytest.fixture(scope="module")
def interrupted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run and its ablation, which Ctrl-C ended while the third fusion took its second model."""
    out = tmp_path_factory.mktemp("runs") / "run"
    tiny_trainer(out, methods=["individual"], training={"steps": 2}).run()
    result = interrupt(out, "--last")
    assert result.exit_code == 130
    last = result.stderr.splitlines()[-1]
    assert last == f"error: interrupted; to go on: condu ablate {out} --last"
    assert [f.name for f in (out / "ablation").iterdir()] == [UNFINISHED]
    return out


@pytest.fixture
def run(interrupted: Path, tmp_path: Path) -> Path:
    """A copy that a test may spoil."""
    return Path(shutil.copytree(interrupted, tmp_path / "run"))


@pytest.fixture
def fusions(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The first variant of each fusion that was measured."""
    names: list[str] = []
    measure = study._measure

    def counted(ground: Any, members: Any, **options: Any) -> Any:
        names.append(members[0].name)
        return measure(ground, members, **options)

    monkeypatch.setattr(study, "_measure", counted)
    return names


def condu(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def interrupt(run: Path, *options: object) -> Result:
    """An ablation that Ctrl-C ends when it loads its sixth model."""
    load, loads = Ground.finetuned, 0

    def counted(ground: Ground, index: int) -> Any:
        nonlocal loads
        loads += 1
        if loads == 6:
            raise KeyboardInterrupt
        return load(ground, index)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Ground, "finetuned", counted)
        return condu("ablate", run, *options)


def test_the_same_call_goes_on(run: Path, fusions: list[str]) -> None:
    whole = ablate(run, last=True)
    assert len(fusions) == FUSIONS
    fusions.clear()
    result = condu("ablate", run, "--last")
    assert result.exit_code == 0, result.output
    assert len(fusions) == FUSIONS - 2
    assert not {"condu", "no masks"} & set(fusions)
    count = len(whole["rows"])
    kept = count - len(fusions)
    assert f"{kept} of {count} variants are measured already" in result.stdout.splitlines()[0]
    resumed = json.loads((run / "ablation" / "ablation.json").read_text())
    assert resumed["rows"] == whole["rows"]
    assert {f.name for f in (run / "ablation").iterdir()} == {"ablation.json", "ablation.md"}


def test_seconds_are_those_of_all_calls(run: Path) -> None:
    file = run / "ablation" / UNFINISHED
    kept = json.loads(file.read_text())
    assert kept["seconds"] > 0
    file.write_text(json.dumps({**kept, "seconds": 5000.0}))
    assert 5000 < ablate(run, last=True, out=run / "ablation")["seconds"] < 5100


def revote(run: Path) -> None:
    file = RunFolder(run).config_file
    values = load_config(file).model_dump()
    values["voting"]["k"] = 1
    file.write_text(make_config(values).to_yaml())


def retrain(run: Path) -> None:
    file = run / "finetuned" / "001.safetensors"
    weights = load_weights(file)
    weights["visual.proj"][0, 0] += 1
    save_weights(file, weights, **load_facts(file))


def update(run: Path) -> None:
    file = run / "ablation" / UNFINISHED
    kept = json.loads(file.read_text())
    kept["basis"]["versions"]["torch"] = "1.0"
    file.write_text(json.dumps(kept))


def damage(run: Path) -> None:
    (run / "ablation" / UNFINISHED).write_text('{"rows": [')


@pytest.mark.parametrize(
    ("change", "said"), [(revote, True), (retrain, True), (update, True), (damage, False)]
)
def test_over_something_else_it_starts_anew(
    run: Path, fusions: list[str], change: Callable[[Path], None], said: bool
) -> None:
    change(run)
    result = condu("ablate", run, "--last")
    assert result.exit_code == 0, result.output
    assert len(fusions) == FUSIONS
    assert "measured already" not in result.stdout
    assert ("measured anew" in result.stdout.splitlines()[0]) == said


def test_a_call_over_all_sessions_leaves_what_one_over_the_last_measured(
    run: Path, fusions: list[str]
) -> None:
    result = condu("ablate", run)
    assert result.exit_code == 0, result.output
    assert len(fusions) == FUSIONS
    assert "measured" not in result.stdout.splitlines()[0]
    fusions.clear()
    assert condu("ablate", run, "--last").exit_code == 0
    assert len(fusions) == FUSIONS - 2


def test_the_runs_own_folder_may_take_it(run: Path) -> None:
    before = {file: file.read_bytes() for file in run.rglob("*") if file.is_file()}
    result = interrupt(run, "--last", "-o", run)
    assert f"condu ablate {run} --out {run} --last" in result.stderr
    assert (run / UNFINISHED).exists()
    assert all(file.read_bytes() == content for file, content in before.items())


def test_without_a_folder_nothing_is_written(run: Path) -> None:
    before = {file: file.read_bytes() for file in run.rglob("*") if file.is_file()}
    ablate(run, last=True)
    assert {f: f.read_bytes() for f in run.rglob("*") if f.is_file()} == before
