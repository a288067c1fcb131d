"""What a run records: a session for each method and task, and what its numbers depend on."""

from __future__ import annotations

import os
import platform
from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib import metadata
from itertools import zip_longest
from typing import TYPE_CHECKING, Any

import torch

import condu_ext
from condu.evaluation import Row
from condu.labels import Protocol
from condu.reconstruction import Fused

if TYPE_CHECKING:
    from condu.tuning import Trained

FORMAT = 2
"""Of `results.json` and `progress.json`; the first one had no number."""


@dataclass(frozen=True)
class PeakBytes:
    """The most memory at a time, see `condu.bench.memory.peaks`."""

    host: int | None
    device: int | None


UNKNOWN_PEAK = PeakBytes(None, None)


@dataclass(frozen=True)
class Learned:
    """What it took a method to learn one task, and showed: wall-clock seconds of fine-tuning, of
    fusing, and of work on behalf of evaluation such as prototypes; of methods that merge an adapter
    into a global one, the share of its weights whose sign was the opposite of the global one's; and
    the memory that the fine-tuning took, which may have been in another session; None if there was
    none."""

    train: float = 0.0
    fuse: float = 0.0
    evaluate: float = 0.0
    misaligned: float | None = None
    peak: PeakBytes | None = None

    @classmethod
    def by(
        cls,
        trained: Trained,
        *,
        fuse: float = 0.0,
        evaluate: float = 0.0,
        misaligned: float | None = None,
    ) -> Learned:
        """By a fine-tuning, whichever method asked for it first."""
        return cls(trained.seconds, fuse, evaluate, misaligned, trained.peak)


@dataclass(frozen=True)
class Unevaluated:
    """A method has learnt task `index`, and its evaluation has not come to its end. `peak`: the
    most memory since the last fine-tuning, if there was one."""

    index: int
    learned: Learned
    peak: PeakBytes


@dataclass(frozen=True)
class PhasePeaks:
    """The highest points of memory while a method was trained, while it fused, its prototypes
    included, and while it was evaluated; None where it did not do that."""

    train: PeakBytes | None
    fuse: PeakBytes | None
    evaluate: PeakBytes | None


@dataclass(frozen=True)
class Session:
    """One method has learnt one task and been evaluated on all.

    Seconds of fine-tuning, fusing and evaluating, and the most memory meanwhile; a fine-tuning that
    several methods share counts in full for each of them. `misaligned`: of methods
    that merge adapters, from the second task on, the share of weights whose sign was not the global
    one's. `fused`: of methods with a unified model; comparing it with what was unified is no part
    of the method, and so of neither seconds nor memory.
    """

    rows: dict[Protocol, Row]
    train: float
    fuse: float
    evaluate: float
    peak_bytes: PhasePeaks
    misaligned: float | None = None
    fused: Fused | None = None


@dataclass(frozen=True)
class TaskData:
    """Class names of a task, and how many images it has for training and for testing."""

    classes: list[str]
    train: int
    test: int


@dataclass(frozen=True)
class Basis:
    """What a run is over: its tasks in order, the data of those that have classes, and a digest of
    the pretrained weights."""

    tasks: list[str]
    data: dict[str, TaskData]
    pretrained: str

    def change(self, now: Basis) -> str | None:
        """The first thing in which another one differs, in words, or None."""
        if self.tasks != now.tasks:
            return f"tasks were {', '.join(self.tasks)} and are {', '.join(now.tasks)} now"
        for task, data in now.data.items():
            if (before := self.data.get(task)) is None:
                return f"task {task!r} had no classes"
            for number, (old, new) in enumerate(zip_longest(before.classes, data.classes)):
                if old != new:  # None: there are no more
                    return f"class {number} of task {task!r} was {old!r} and is {new!r} now"
            for split in ("train", "test"):
                if (old := getattr(before, split)) != (new := getattr(data, split)):
                    return f"task {task!r} had {old} {split} images and has {new} now"
        if self.pretrained != now.pretrained:
            return "the pretrained weights are others now"
        return None


@dataclass
class Progress:
    """What `progress.json` holds: of each method its sessions so far, one for each task learnt, and
    what it has learnt beyond them."""

    basis: Basis
    methods: dict[str, list[Session]] = field(default_factory=dict)
    unevaluated: dict[str, Unevaluated] = field(default_factory=dict)
    format: int = FORMAT


def accuracy_rows(sessions: Sequence[Session], protocol: Protocol) -> list[list[float]]:
    """The accuracy matrix so far, a row for each session."""
    return [session.rows[protocol].accuracy for session in sessions]


def machine_of(device: torch.device, processes: int) -> dict[str, Any]:
    """What seconds and bytes of a run depend on: `device` is the GPU's name, or "cpu"."""
    return {
        "cpus": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "processes": processes,
    }


def versions() -> dict[str, str]:
    """Versions of what the numbers of a run depend on, and the instruction set of the kernels."""
    return {
        "condu": metadata.version("condu"),
        "condu_ext": str(condu_ext.build_info()["version"]),
        "condu_ext_isa": str(condu_ext.build_info()["cpu_isa"]),
        "open_clip": metadata.version("open_clip_torch"),
        "transformers": metadata.version("transformers"),
        "peft": metadata.version("peft"),
        "accelerate": metadata.version("accelerate"),
        "torch": torch.__version__,
        "python": platform.python_version(),
    }
