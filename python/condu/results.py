"""`results.json`: what a finished run holds, made of its sessions."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from condu.labels import Protocol
from condu.metrics import summarize
from condu.reconstruction import Fused
from condu.record import FORMAT, PhasePeaks, Progress, Session, accuracy_rows, versions

if TYPE_CHECKING:
    from condu.config import RunConfig
    from condu.tasks.benchmark import Benchmark


@dataclass(frozen=True)
class ProtocolResults:
    """A method under one protocol: matrix[session][data set] in percent and its summary, in which
    what is not defined for a single task is None; votes[session][data set][expert], if any."""

    matrix: list[list[float]]
    transfer: float | None
    average: float
    last: float
    acc: float
    bwt: float | None
    forgetting: float | None
    votes: list[list[list[int]]] | None = None


@dataclass(frozen=True)
class SessionResults:
    """A `condu.record.Session` without its rows."""

    train: float
    fuse: float
    evaluate: float
    peak_bytes: PhasePeaks
    misaligned: float | None
    fused: Fused | None


@dataclass(frozen=True)
class Seconds:
    """Sums over a method's sessions."""

    train: float
    fuse: float
    evaluate: float


@dataclass(frozen=True)
class MethodResults:
    protocols: dict[str, ProtocolResults]
    seconds: Seconds
    sessions: list[SessionResults]


@dataclass(frozen=True)
class Results:
    """What a reader may rely on; further keys may stand beside these."""

    format: int
    benchmark: str
    seed: int
    tasks: list[str]
    classes: dict[str, list[str]]
    methods: dict[str, MethodResults]
    configuration: dict[str, Any]
    versions: dict[str, Any]
    machine: dict[str, Any]


def results_of(
    progress: Progress, benchmark: Benchmark, config: RunConfig, machine: dict[str, Any]
) -> dict[str, Any]:
    """What `results.json` holds when every method has learnt every task: a `Results` as JSON."""
    return {
        "format": FORMAT,
        "benchmark": benchmark.name,
        "seed": config.seed,
        "tasks": progress.basis.tasks,
        "classes": {task: data.classes for task, data in progress.basis.data.items()},
        "images": {
            task: {"train": data.train, "test": data.test}
            for task, data in progress.basis.data.items()
        },
        "methods": {name: _method(sessions) for name, sessions in progress.methods.items()},
        "configuration": config.model_dump(mode="json"),
        "versions": versions(),
        "machine": machine,
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
