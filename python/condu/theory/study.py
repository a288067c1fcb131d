"""Both theorems and the corollary on fine-tuned deltas and on random ones, as one record."""

from __future__ import annotations

import time
from dataclasses import asdict
from datetime import date
from typing import Any

import numpy as np
import torch

from condu.bench.record import machine
from condu.progress import RunProgress
from condu.theory.deltas import Deltas, RandomDeltas, SampledDeltas
from condu.theory.finetunings import FineTunings
from condu.theory.joining import decay, join
from condu.theory.repetition import repeat

NUMBERS = (2, 5, 10, 20, 50)
"""Of tasks, at which repeating is looked at; and all of them."""

SAMPLE = 2**16
"""Elements over which it is, drawn once. Thousands of iterations take minutes over so many, hours
over all, and the theorem holds for vectors of any length."""

Record = dict[str, Any]


def study(fine_tunings: FineTunings, tasks: int, iterations: int) -> Record:
    """What `theory.json` holds:

        {"format": 1, "date", "tasks", "elements": N, "sample": elements drawn for repeating,
         "iterations": the greatest number, "models": [names of the fine-tuned ones],
         "deltas": {"fine-tuned" | "random": {
            "repetition": [fields of `Repetition`, but "changes" as [[iteration, change], …] for
                some; "iterations": all that were done; "order_stays", "all_meet", "converged"],
            "joining": [fields of `Joining`], "decay": `decay` of them, null below 20 tasks}},
         "seconds": {"fine-tuned": s, "random": s} of measuring, "configuration": of fine-tuning,
         "machine": {…}}

    Random deltas are Gaussian with the scale of each fine-tuned tensor. Raises ValueError for fewer
    than 2 tasks or than 1 iteration, and what `FineTunings.deltas` raises, before any training.
    """
    if tasks < 2:
        raise ValueError(f"tasks: must be at least 2, for one has nothing to meet, got {tasks}")
    if iterations < 1:
        raise ValueError(f"iterations: must be at least 1, got {iterations}")
    finetuned, seed = fine_tunings.deltas(tasks), fine_tunings.config.seed
    scale = finetuned.scale()
    sources: dict[str, Deltas] = {
        "fine-tuned": finetuned,
        "random": RandomDeltas(tasks, scale, seed),
    }
    record: Record = {
        "format": 1,
        "date": date.today().isoformat(),
        "tasks": tasks,
        "elements": len(scale),
        "sample": min(SAMPLE, len(scale)),
        "iterations": iterations,
        "models": list(finetuned.names),
        "deltas": {},
        "seconds": {},
        "configuration": fine_tunings.config.model_dump(mode="json"),
        "machine": machine(torch.device("cpu")),
    }
    progress = fine_tunings.progress
    for name, deltas in sources.items():
        began = time.perf_counter()
        sample = SampledDeltas.draw(deltas, len(scale), SAMPLE, seed)
        record["deltas"][name] = {
            "repetition": _repetitions(name, sample, tasks, iterations, progress),
            **_joinings(name, deltas, tasks, progress),
        }
        record["seconds"][name] = time.perf_counter() - began
    return record


def _repetitions(
    name: str, deltas: Deltas, tasks: int, iterations: int, progress: RunProgress
) -> list[Record]:
    repetitions = []
    for number in (*(n for n in NUMBERS if n < tasks), tasks):
        with progress.rounds(f"{name}: repeating over {number} tasks", iterations) as advance:
            found = repeat(deltas, number, iterations, advance)
        progress.line(
            f"{name}, {number} tasks: {len(found.changes)} iterations, the last changed "
            f"{found.changes[-1]:.1e} of the deltas"
        )
        facts = {
            "changes": [[k, found.changes[k - 1]] for k in _spread(len(found.changes))],
            "iterations": len(found.changes),
            "order_stays": found.order_stays,
            "all_meet": found.all_meet,
            "converged": found.converged,
        }
        repetitions.append(asdict(found) | facts)
    return repetitions


def _spread(count: int) -> list[int]:
    """Some of the numbers 1 … `count`, first and last too, even on a logarithmic axis."""
    return np.unique(np.geomspace(1, count, 100).round().astype(int)).tolist()


def _joinings(name: str, deltas: Deltas, tasks: int, progress: RunProgress) -> Record:
    with progress.rounds(f"{name}: {tasks} tasks join", tasks - 1) as advance:
        joinings = join(deltas, tasks, advance)
    progress.line(f"{name}: task {tasks} changed {joinings[-1].delta_change:.1e} of the old deltas")
    return {"joining": [asdict(row) for row in joinings], "decay": decay(joinings)}
