"""A run in TensorBoard or Weights & Biases while it goes on, through accelerate's trackers.

    training/<fine-tuning>/<task>/{loss,lr}                over the steps of that task
    sessions/<method>/<protocol>/{transfer,average,last}   of the tasks so far; over their number
    sessions/<method>/<protocol>/accuracy/<task>           of every data set
    sessions/<method>/{rescaler/<task>,seconds/{train,fuse,evaluate}}

A fine-tuning is named as its folder in the run folder is: `finetuned` and `lora-<rank>` are shared
by methods, the others are a method's own.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from accelerate.tracking import get_available_trackers

from condu.config import ConfigError, RunConfig, leaves
from condu.metrics import summarize
from condu.record import Session, accuracy_rows

if TYPE_CHECKING:
    from accelerate import Accelerator

Track = Callable[[int, float, float], None]
"""Called after a step of training with its number from 1, its loss and its learning rate."""


def check_trackers(config: RunConfig) -> None:
    """Raises `ConfigError` for a tracker whose package is not installed, which accelerate would
    leave out without a word."""
    there = {str(tracker) for tracker in get_available_trackers()}
    for name in config.trackers:
        if name not in there:
            raise ConfigError(f"trackers: {name!r} is not installed: pip install {name}")


class Tracking:
    """What a run tells the trackers of `accelerator`: nothing if there are none, and nothing in
    other processes than the main one."""

    def __init__(self, accelerator: Accelerator) -> None:
        self._accelerator = accelerator

    @contextmanager
    def started(self, config: RunConfig, folder: Path) -> Iterator[None]:
        """Start the trackers with the configuration, and close them at the end."""
        kept = folder / "tracking"
        options = {"wandb": {"name": folder.name, "dir": str(kept)}}
        if config.trackers and self._accelerator.is_main_process:
            kept.mkdir(exist_ok=True)  # where Weights & Biases finds none, it takes another one
        self._accelerator.init_trackers("condu", _flat(config), options)
        for tracker in self._accelerator.trackers:
            if tracker.name == "wandb":
                for part in ("training", "sessions"):
                    tracker.tracker.define_metric(f"{part}/*", step_metric=f"{part}/step")
        try:
            yield
        finally:
            for tracker in self._accelerator.trackers:
                tracker.finish()

    def training(self, finetuning: str, task: str) -> Track:
        """To be called after each step of a fine-tuning on a task."""
        prefix = f"training/{finetuning}/{task}"

        def track(step: int, loss: float, lr: float) -> None:
            self._log({f"{prefix}/loss": loss, f"{prefix}/lr": lr}, "training", step)

        return track

    def session(self, method: str, tasks: Sequence[str], sessions: Sequence[Session]) -> None:
        """The last of a method's sessions so far."""
        prefix, last, learned = f"sessions/{method}", sessions[-1], len(sessions)
        values = {
            f"{prefix}/seconds/{kind}": getattr(last, kind)
            for kind in ("train", "fuse", "evaluate")
        }
        for protocol, row in last.rows.items():
            so_far = summarize([r[:learned] for r in accuracy_rows(sessions, protocol)])
            for metric in ("transfer", "average", "last"):
                values[f"{prefix}/{protocol}/{metric}"] = getattr(so_far, metric)
            for task, accuracy in zip(tasks, row.accuracy, strict=True):
                values[f"{prefix}/{protocol}/accuracy/{task}"] = accuracy
        if last.fused is not None:
            for task, trigger in last.fused.tasks.items():
                values[f"{prefix}/rescaler/{task}"] = trigger.rescaler
        defined = {key: value for key, value in values.items() if not math.isnan(value)}
        self._log(defined, "sessions", learned)

    def _log(self, values: dict[str, float], part: str, step: int) -> None:
        for tracker in self._accelerator.trackers:
            if tracker.name == "wandb":  # whose own step may never go back, as ours does
                tracker.log({**values, f"{part}/step": step})
            else:
                tracker.log(values, step=step)


def _flat(config: RunConfig) -> dict[str, str | int | float | bool]:
    """The configuration by dotted key, in types that every tracker takes."""
    return {
        key: value if isinstance(value, (str, int, float)) else json.dumps(value)
        for key, value in leaves(config.model_dump(mode="json"))
    }
