"""Times: of one call, of repeated calls, and of a kernel and the ceiling by turns."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch

from condu.bench.ceiling import Copy

Prepare = Callable[[], Any]
Run = Callable[[Any], Any]


@dataclass(frozen=True)
class Times:
    """Seconds: median, 20th and 80th percentile, and of how many calls."""

    median: float
    p20: float
    p80: float
    runs: int

    @classmethod
    def of(cls, seconds: list[float]) -> Times:
        low, high = np.percentile(seconds, [20, 80]).tolist()
        return cls(statistics.median(seconds), low, high, len(seconds))


def timed(run: Callable[[], Any], device: torch.device) -> tuple[float, Any]:
    """Seconds of a call and its result: by events on a GPU, so that what is still queued before it
    does not count."""
    if device.type == "cuda":
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize(device)
        begin.record()
        result = run()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end) / 1e3, result
    began = time.perf_counter()
    result = run()
    return time.perf_counter() - began, result


def repeated(
    prepare: Prepare, run: Run, device: torch.device, repeats: int, budget: float
) -> list[float]:
    """Seconds of up to ``repeats`` calls, fewer once they have taken ``budget`` seconds together.
    ``prepare`` makes the argument of each call, untimed."""
    seconds: list[float] = []
    while len(seconds) < repeats and (not seconds or sum(seconds) < budget):
        argument = prepare()
        taken, result = timed(partial(run, argument), device)
        seconds.append(taken)
        del argument, result
    return seconds


@dataclass(frozen=True)
class Paired:
    """A kernel and the copy, timed by turns.

    Attributes:
        kernel, copy: their times.
        ratio: median of the paired ratios of the kernel's rate to the copy's.
    """

    kernel: Times
    copy: Times
    ratio: float


def paired(
    prepare: Prepare, run: Run, moved: int, copy: Copy, device: torch.device, repeats: int
) -> Paired:
    """Time copy and kernel by turns, after one untimed call of each.

    Args:
        prepare: makes the argument of each call, untimed.
        moved: bytes that the kernel has to move, to compare its rate with the copy's.
    """
    run(prepare())
    copy()
    kernel_seconds, copy_seconds, ratios = [], [], []
    for _ in range(repeats):
        argument = prepare()
        taken_copy, _ = timed(copy, device)
        taken, result = timed(partial(run, argument), device)
        del argument, result
        kernel_seconds.append(taken)
        copy_seconds.append(taken_copy)
        ratios.append((moved / taken) / (copy.moved / taken_copy))
    return Paired(Times.of(kernel_seconds), Times.of(copy_seconds), statistics.median(ratios))
