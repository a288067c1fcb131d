from __future__ import annotations

import json
import re
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
from tiny_run import tiny_benchmark, tiny_clip, tiny_config
from typer.testing import CliRunner, Result

from condu import trainer
from condu.cli import app
from condu.config import ConfigError
from condu.methods import ALL, METHODS
from condu.tasks import configured


@pytest.fixture(autouse=True)
def _tiny(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Every command works on the tiny benchmark, in a folder of its own."""
    monkeypatch.setattr(configured, "load_benchmark", lambda name, seed: tiny_benchmark())
    monkeypatch.setattr(trainer, "load_model", lambda name, pretrained: tiny_clip())
    monkeypatch.chdir(tmp_path)


def condu(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def refused(result: Result) -> str:
    """The one line that a command wrote before it ended with status 2."""
    assert result.exit_code == 2, result.output
    assert result.stdout == ""
    (line,) = result.stderr.splitlines()
    assert line.startswith("error: ")
    return line


def write_config(**changes: Any) -> Path:
    path = Path("tiny.yaml")
    path.write_text(tiny_config(**changes).to_yaml())
    return path


def test_demo_prints_the_table_and_writes_the_results() -> None:
    result = condu("demo", "--out", "here", "--tasks", 2, "--steps", 2, "--seed", 3)
    assert result.exit_code == 0, result.output
    for method in ("zero_shot", "individual", "sequential", "condu"):
        assert re.search(rf"^ *{method} +\d", result.stdout, re.MULTILINE)
    assert "hues: 2 steps from the pretrained model in" in result.stdout
    found = json.loads(Path("here/results.json").read_text())
    assert (found["seed"], found["tasks"]) == (3, ["hues", "tones"])


def test_demo_can_run_every_method() -> None:
    result = condu("demo", "--all", "--steps", 2, "--quiet")
    assert result.exit_code == 0, result.output
    for method in ALL:
        assert re.search(rf"^ *{method} +\d", result.stdout, re.MULTILINE)
    assert set(ALL) == set(METHODS)


def test_demo_takes_a_new_folder_each_time_and_is_quiet_when_asked() -> None:
    for name in ("demo", "demo-2"):
        result = condu("demo", "--tasks", 1, "--steps", 1, "--quiet")
        assert result.exit_code == 0, result.output
        assert Path("runs", name, "results.json").exists()
        assert "steps" not in result.stdout
        assert "condu" in result.stdout


@pytest.mark.parametrize(
    ("option", "value", "expected"),
    [
        ("--steps", 0, "error: demo: training.steps: input should be greater"),
        ("--tasks", 9, "error: benchmark.tasks: got 9, but there are 2 tasks"),
        ("--seed", -1, "error: demo: seed: input should be greater"),
    ],
)
def test_demo_refuses_bad_options(option: str, value: int, expected: str) -> None:
    assert refused(condu("demo", option, value, "--quiet")).startswith(expected)


def test_run_resume_and_report() -> None:
    config = write_config(training={"steps": 2})
    assert condu("run", config, "--quiet").exit_code == 0
    assert "use" not in (line := refused(condu("run", config, "--quiet")))
    assert "runs/tiny exists" in line
    assert "--resume" in line
    assert condu("run", config, "--resume").exit_code == 0
    result = condu("report", "runs/tiny")
    assert result.exit_code == 0, result.output
    assert "condu, agnostic" in result.stdout
    pictures = {file.name for file in Path("runs/tiny/report").iterdir()}
    assert pictures >= {"summary.png", "accuracy-condu-agnostic.png"}
    assert all(f"runs/tiny/report/{name}" in result.stdout for name in pictures)


def test_resume_with_another_configuration_names_the_key() -> None:
    assert condu("run", write_config(methods=["zero_shot"]), "--quiet").exit_code == 0
    line = refused(condu("run", write_config(methods=["zero_shot"], seed=7), "--resume", "--quiet"))
    assert "seed was 42 and is now 7" in line


def test_a_wrong_configuration_is_one_line() -> None:
    Path("bad.yaml").write_text("training: {stepz: 3}")
    line = refused(condu("run", "bad.yaml"))
    assert line == "error: bad.yaml: unknown key 'training.stepz', did you mean 'steps'?"


def test_the_version_is_the_distributions() -> None:
    result = condu("--version")
    assert (result.exit_code, result.stdout) == (0, f"condu {metadata.version('condu')}\n")


def test_a_missing_file_is_one_line() -> None:
    assert "none.yaml" in refused(condu("run", "none.yaml"))
    assert "none is not the folder of a run" in refused(condu("report", "none"))


def test_debug_shows_the_traceback() -> None:
    result = condu("run", "none.yaml", "--debug")
    assert isinstance(result.exception, ConfigError)


def test_an_interrupted_run_says_how_to_go_on(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(trainer.ContinualTrainer, "run", interrupt)
    result = condu("run", write_config(), "--quiet")
    assert result.exit_code == 130
    assert "condu run runs/tiny/config.yaml --out runs/tiny --resume" in result.stderr


def test_doctor_shows_build_versions_and_devices() -> None:
    result = condu("doctor")
    assert result.exit_code == 0, result.output
    for word in ("condu_ext", "torch", "open_clip_torch", "CPU", "GPU"):
        assert word in result.stdout


def test_without_the_extra_doctor_works_and_the_others_say_what_to_install() -> None:
    program = """
import sys
from importlib.abc import MetaPathFinder
class Missing(MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in EXTRA.keys() - {"pydantic"}:  # recent typer needs that itself
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
from condu.cli import app
from condu.terminal import EXTRA
sys.meta_path.insert(0, Missing())
app(sys.argv[1:])
"""

    def condu(*arguments: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-c", program, *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=False)

    assert condu("doctor").returncode == 0
    demo = condu("demo")
    assert demo.returncode == 2
    assert demo.stderr.strip() == 'error: condu demo needs yaml: pip install "condu[train]"'
