"""What a run tells trackers: TensorBoard's files are read back, Weights & Biases is a stand-in."""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from accelerate import tracking as accelerate_tracking
from accelerate.utils import LoggerType
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tiny_run import numbers, tiny_config, tiny_trainer

from condu import training
from condu.config import ConfigError, difference, make_config
from condu.training import learning_rate
from condu.tuning import Trained

METHODS = ["condu", "sequential"]


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Of a run without trackers."""
    return tiny_trainer(tmp_path_factory.mktemp("runs") / "run", methods=METHODS).run()


def test_tensorboard_shows_the_run_and_changes_none_of_its_numbers(
    results: dict[str, Any], tmp_path: Path
) -> None:
    out = tmp_path / "run"
    found = tiny_trainer(out, methods=METHODS, trackers=["tensorboard"]).run()
    assert numbers(found) == numbers(results)

    events = EventAccumulator(str(out / "tracking" / "condu"))
    events.Reload()
    curves = {
        tag: {event.step: event.value for event in events.Scalars(tag)}
        for tag in events.Tags()["scalars"]
    }

    def near(tag: str, expected: dict[int, float]) -> None:
        assert curves[tag] == pytest.approx(expected, rel=1e-6), tag  # float32 in the file

    steps, peak = 16, 3e-3
    for name in ("finetuned/hues", "finetuned/tones", "sequential/tones"):
        rates = [learning_rate(i, steps=steps, warmup=2, peak=peak) for i in range(steps)]
        near(f"training/{name}/lr", dict(enumerate(rates, start=1)))
        assert list(curves[f"training/{name}/loss"]) == list(range(1, steps + 1))
    last = Trained.open(out / "finetuned" / "001.safetensors").loss  # mean of one step of 16
    assert curves["training/finetuned/tones/loss"][16] == pytest.approx(last, rel=1e-6)
    assert "training/sequential/hues/loss" not in curves  # shared with condu

    for method, entry in found["methods"].items():
        for protocol, table in entry["protocols"].items():
            prefix, matrix = f"sessions/{method}/{protocol}", table["matrix"]
            near(f"{prefix}/average", {1: matrix[0][0], 2: table["average"]})
            near(f"{prefix}/last", {1: matrix[0][0], 2: table["last"]})
            near(f"{prefix}/transfer", {2: table["transfer"]})  # one task has none
            near(f"{prefix}/accuracy/tones", {1: matrix[0][1], 2: matrix[1][1]})
        for kind in ("train", "fuse", "evaluate"):
            seconds = [session[kind] for session in entry["sessions"]]
            near(f"sessions/{method}/seconds/{kind}", dict(enumerate(seconds, start=1)))
    triggers = found["methods"]["condu"]["sessions"][1]["fused"]["tasks"]
    near("sessions/condu/rescaler/tones", {2: triggers["tones"]["rescaler"]})
    assert curves["sessions/condu/rescaler/hues"].keys() == {1, 2}


class Recorder:
    """As much of `wandb` as accelerate's tracker calls."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, Any]] = []
        self.config = SimpleNamespace(update=self._update)

    def init(self, **options: Any) -> Recorder:
        self.calls.append(("init", options))
        return self

    def define_metric(self, name: str, step_metric: str) -> None:
        self.calls.append(("define_metric", (name, step_metric)))

    def log(self, values: dict[str, Any], step: int | None = None) -> None:
        assert step is None  # Weights & Biases drops what comes with a lower step than before
        self.calls.append(("log", values))

    def finish(self) -> None:
        self.calls.append(("finish", None))

    def _update(self, values: dict[str, Any], **options: Any) -> None:
        self.calls.append(("config", values))


@pytest.fixture
def wandb(monkeypatch: pytest.MonkeyPatch) -> Recorder:
    recorder = Recorder()
    monkeypatch.setitem(sys.modules, "wandb", recorder)  # type: ignore[arg-type]
    there = [*accelerate_tracking.get_available_trackers(), LoggerType.WANDB]
    monkeypatch.setattr(accelerate_tracking, "_available_trackers", there)
    return recorder


def test_weights_and_biases_gets_axes_of_our_own(wandb: Recorder, tmp_path: Path) -> None:
    tiny_trainer(tmp_path / "run", methods=["condu"], trackers=["wandb"]).run()
    kinds = [kind for kind, _ in wandb.calls]
    assert kinds[:4] == ["init", "config", "define_metric", "define_metric"]
    assert kinds[-1] == "finish"
    (_, options), (_, config), (_, first), (_, second), *_ = wandb.calls
    assert options["name"] == "run"
    assert Path(options["dir"]).is_dir()
    assert config["training.lr"] == 3e-3
    assert all(isinstance(value, (str, int, float)) for value in config.values())
    assert {first, second} == {
        ("training/*", "training/step"),
        ("sessions/*", "sessions/step"),
    }
    logged = [values for kind, values in wandb.calls if kind == "log"]
    steps = [values["training/step"] for values in logged if "training/step" in values]
    assert steps == [*range(1, 17)] * 2
    assert [v["sessions/step"] for v in logged if "sessions/step" in v] == [1, 2]


def test_trackers_are_closed_after_an_error(wandb: Recorder, tmp_path: Path) -> None:
    trainer = tiny_trainer(
        tmp_path / "run", methods=["condu"], trackers=["wandb"], training={"lr": 1e30}
    )
    with pytest.raises(FloatingPointError):
        trainer.run()
    assert wandb.calls[-1] == ("finish", None)


def test_a_tracker_that_is_not_installed_is_named_before_anything_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(accelerate_tracking, "_available_trackers", [LoggerType.TENSORBOARD])
    monkeypatch.setattr(training, "shuffled_batches", None)
    trainer = tiny_trainer(tmp_path / "run", trackers=["tensorboard", "wandb"])
    with pytest.raises(ConfigError, match=r"trackers: 'wandb' is not installed: pip install wandb"):
        trainer.run()
    assert not (tmp_path / "run").exists()


def test_trackers_may_differ_on_resume_and_unknown_ones_may_not() -> None:
    assert difference(tiny_config(), tiny_config(trackers=["tensorboard"])) is None
    with pytest.raises(ConfigError, match=r"trackers\.0"):
        make_config({"trackers": ["tensorbord"]})
    with pytest.raises(ConfigError, match="'wandb' is listed twice"):
        make_config({"trackers": ["wandb", "wandb"]})
