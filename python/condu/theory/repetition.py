"""Theorem F.3: decouple and unify the same deltas again and again, and they converge.

The theorem (arXiv 2503.10705, appendix F) asks that the order of the rescalers stays and that every
pair of masks meets. Here both are looked at, and nothing is assumed of them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import combinations, pairwise

import numpy as np
import torch
from torch import Tensor

import condu_ext as cx
from condu.theory.deltas import NAME, Deltas

RESOLUTION = 2.0**-23
"""Of float32: the gap between 1 and the next number. A relative change below it is none."""


@dataclass(frozen=True)
class Repetition:
    """What repeating did to the deltas of some tasks.

    changes: Σ‖d' − d‖₁ over the tasks in each iteration, of the Σ‖d‖₁ that were given and that
        decoupling keeps; the first iteration unifies the deltas as they were given.
    swaps: pairs of tasks whose λ changed their order, by the iteration (from 2 on), where any did.
    mask_flips: mask bits of the last iteration that differ from the first one's.
    pairs, meeting: pairs of tasks, and those whose masks share an element after the first one.
    least_overlap: elements that two masks share, of those of the smaller one; the least of a pair.
    rescalers_first, rescalers_last: λ of the tasks in the first and in the last iteration.
    """

    tasks: int
    changes: list[float]
    swaps: dict[int, int]
    mask_flips: int
    pairs: int
    meeting: int
    least_overlap: float
    rescalers_first: list[float]
    rescalers_last: list[float]

    @property
    def order_stays(self) -> bool:
        return not self.swaps

    @property
    def all_meet(self) -> bool:
        return self.meeting == self.pairs

    @property
    def converged(self) -> bool:
        """Whether the last change is below the resolution of float32."""
        return self.changes[-1] <= RESOLUTION


def repeat(
    deltas: Deltas, tasks: int, iterations: int, advance: Callable[[int], None]
) -> Repetition:
    """Decouple and unify the first `tasks` deltas until they change no more, or `iterations` times.

    They are in memory all the time, with the unified delta and one more vector: 4·(tasks + 2) bytes
    an element. `advance` is called with the number of iterations done since the last call.

    Raises ValueError for fewer than 2 tasks or than 1 iteration, or more tasks than there are
    deltas; naming the task, if a delta is not finite.
    """
    if not 2 <= tasks <= len(deltas.names):
        raise ValueError(f"tasks: must be from 2 to the {len(deltas.names)} deltas, got {tasks}")
    if iterations < 1:
        raise ValueError(f"iterations: must be at least 1, got {iterations}")
    current = {deltas.names[i]: {NAME: deltas[i]} for i in range(tasks)}
    norm = sum(l1(tensors[NAME]) for tensors in current.values())
    changes: list[float] = []
    rescalers: list[np.ndarray] = []
    while len(changes) < iterations and (not changes or changes[-1] > RESOLUTION):
        state = cx.unify(current, None)
        rescalers.append(rescalers_of(state))
        if not changes:
            first_masks = packed_masks(state)
        change = _decouple_all(state, current)
        changes.append(change / norm if norm else 0.0)
        advance(1)
    swaps = {k: swapped(a, b) for k, (a, b) in enumerate(pairwise(rescalers), start=2)}
    overlaps = [_overlap(a, b) for a, b in combinations(first_masks, 2)]
    return Repetition(
        tasks=tasks,
        changes=changes,
        swaps={k: pairs for k, pairs in swaps.items() if pairs},
        mask_flips=_bits(first_masks ^ packed_masks(state)),
        pairs=len(overlaps),
        meeting=sum(overlap > 0 for overlap in overlaps),
        least_overlap=min(overlaps),
        rescalers_first=rescalers[0].tolist(),
        rescalers_last=rescalers[-1].tolist(),
    )


def packed_masks(state: cx.UnifiedDelta) -> np.ndarray:
    """Masks of all tasks, uint8 [T, ceil(N / 8)]."""
    return np.stack([state.packed_mask(task)[NAME].numpy() for task in state.tasks])


def rescalers_of(state: cx.UnifiedDelta) -> np.ndarray:
    """λ of all tasks, float64 [T]."""
    return np.array([state.rescaler(task) for task in state.tasks])


def swapped(before: np.ndarray, after: np.ndarray) -> int:
    """Pairs whose order in `before` [T] is the opposite of that in `after` [T]. Differences within
    the resolution of float32 are none: rescalers that approach each other end there."""
    gaps = [values[:, None] - values[None, :] for values in (before, after)]
    return int(((gaps[0] > RESOLUTION) & (gaps[1] < -RESOLUTION)).sum())


def _decouple_all(state: cx.UnifiedDelta, current: dict[str, dict[str, Tensor]]) -> float:
    """Put the decoupled deltas in the place of the current ones; returns Σ‖d' − d‖₁."""
    change = 0.0
    for task, tensors in current.items():
        old, tensors[NAME] = tensors[NAME], cx.decouple(state, task, None)[NAME]
        change += l1(old.sub_(tensors[NAME]))
    return change


def l1(vector: Tensor) -> float:
    """The sum of the absolute values, added in float64."""
    return float(vector.abs().sum(dtype=torch.float64))


def _bits(packed: np.ndarray) -> int:
    return int(np.bitwise_count(packed).sum())


def _overlap(a: np.ndarray, b: np.ndarray) -> float:
    smaller = min(_bits(a), _bits(b))
    return _bits(a & b) / smaller if smaller else 0.0
