"""What a run records: a session for each method and task, and `results.json`, made of them all."""

from __future__ import annotations

import math
import os
import platform
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from importlib import metadata
from typing import TYPE_CHECKING, Any

import torch

import condu_ext
from condu.config import RunConfig
from condu.evaluation import Row
from condu.labels import Protocol
from condu.metrics import summarize
from condu.reconstruction import Fused
from condu.tasks.benchmark import Task

if TYPE_CHECKING:
    from condu.tasks.benchmark import Benchmark

FORMAT = 2
"""Of `results.json` and `progress.json`; the first one had no number."""


@dataclass(frozen=True)
class PeakBytes:
    """The most memory at a time, see `condu.bench.memory.peaks`."""

    host: int | None
    device: int | None


@dataclass(frozen=True)
class Session:
    """One method has learnt one task and been evaluated on all.

    Seconds of fine-tuning (of whichever method asked for it first, if several share it), fusing,
    evaluating. `misaligned`: of methods that merge adapters, from the second task on, the share of
    weights whose sign was not the global one's. `fused`: of methods with a unified model.
    """

    rows: dict[Protocol, Row]
    train: float
    fuse: float
    evaluate: float
    peak_bytes: PeakBytes
    misaligned: float | None = None
    fused: Fused | None = None


@dataclass
class Progress:
    """What `progress.json` holds: of each method its sessions so far, one for each task learnt."""

    tasks: list[str]
    methods: dict[str, list[Session]] = field(default_factory=dict)
    format: int = FORMAT


def results_of(progress: Progress, benchmark: Benchmark, config: RunConfig) -> dict[str, Any]:
    """What `results.json` holds when every method has learnt every task."""
    return {
        "format": FORMAT,
        "benchmark": benchmark.name,
        "seed": config.seed,
        "tasks": progress.tasks,
        "classes": {t.name: list(t.classnames) for t in benchmark if isinstance(t, Task)},
        "methods": {name: _method(sessions) for name, sessions in progress.methods.items()},
        "configuration": config.model_dump(mode="json"),
        "versions": versions(),
        "machine": {"cpus": os.cpu_count(), "threads": torch.get_num_threads()},
    }


def accuracy_rows(sessions: Sequence[Session], protocol: Protocol) -> list[list[float]]:
    """The accuracy matrix so far, a row for each session."""
    return [session.rows[protocol].accuracy for session in sessions]


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


def _method(sessions: Sequence[Session]) -> dict[str, Any]:
    listed = []
    for session in sessions:
        entry = asdict(session)
        del entry["rows"]  # they are the matrices' and the votes'
        listed.append(entry)
    return {
        "protocols": {protocol: _protocol(sessions, protocol) for protocol in sessions[0].rows},
        "seconds": {
            kind: math.fsum(entry[kind] for entry in listed)
            for kind in ("train", "fuse", "evaluate")
        },
        "sessions": listed,
    }


def _protocol(sessions: Sequence[Session], protocol: Protocol) -> dict[str, Any]:
    """A matrix with its summary, in which what is not defined for a single task is null; and the
    votes."""
    matrix = accuracy_rows(sessions, protocol)
    table: dict[str, Any] = {"matrix": matrix} | {
        metric: None if math.isnan(value) else value
        for metric, value in asdict(summarize(matrix)).items()
    }
    votes = [session.rows[protocol].votes for session in sessions]
    return table if None in votes else table | {"votes": votes}
