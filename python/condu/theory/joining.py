"""Theorem F.5 and Corollary F.6: what a new task does to those that were there, against their
number (arXiv 2503.10705, appendix F).

Deltas are absorbed one after another. When the n-th joins, the state before is compared with the
state after: mask bits, elected signs, winning deltas, decoupled deltas.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

import condu_ext as cx
from condu.theory.deltas import NAME, Deltas
from condu.theory.repetition import l1, packed_masks, rescalers_of

FEWEST = 20
"""Tasks below which a power is none of their number: the second half has too few points."""

NOBODY = -1
"""The winner where no mask is set."""


@dataclass(frozen=True)
class Joining:
    """What happened when task n joined. Shares are of the elements that some task had moved before.

    tasks: n. elements: how many some task had moved before.
    mask_flips: share of the old tasks' mask bits that changed; mask_losses: of those that were set,
        the share that is not any more.
    sign_flips: share whose elected sign changed.
    winner_changes: share whose winning delta is another task's than before: the one with the
        greatest |d| among those that agree with the elected sign.
    won_by_new: share that the new task won.
    delta_change: ‖d̃' − d̃‖₁ / ‖d̃‖₁ of the old tasks' decoupled deltas, the mean over tasks.
    """

    tasks: int
    elements: int
    mask_flips: float
    mask_losses: float
    sign_flips: float
    winner_changes: float
    won_by_new: float
    delta_change: float


def join(deltas: Deltas, tasks: int, advance: Callable[[int], None]) -> list[Joining]:
    """Absorb the first `tasks` deltas in their order; returns what each from the second on did.

    In memory are two states, the new delta and a few more vectors, however many tasks there are.
    `advance` is called with 1 after each.

    Raises ValueError for fewer than 2 tasks or more than there are deltas; naming the task, if a
    delta is not finite.
    """
    if not 2 <= tasks <= len(deltas.names):
        raise ValueError(f"tasks: must be from 2 to the {len(deltas.names)} deltas, got {tasks}")
    state = cx.unify({deltas.names[0]: {NAME: deltas[0]}}, None)
    winners = torch.where(state.delta[NAME] != 0, 0, NOBODY).to(torch.int16)
    found = []
    for index in range(1, tasks):
        joined = cx.absorb(state, deltas.names[index], {NAME: deltas[index]}, None)
        new_winners = _winners(state, joined)
        found.append(_compare(state, joined, winners, new_winners))
        state, winners = joined, new_winners
        advance(1)
    return found


def decay(joinings: Sequence[Joining]) -> float | None:
    """The power p of the line c·n^p through the logarithms of `delta_change` against n, over the
    second half of the tasks, by least squares. None of fewer than 20 tasks, whose second half is a
    handful of points that any power fits, and where it has no two changes above 0."""
    if joinings[-1].tasks < FEWEST:
        return None
    half = [row for row in joinings[len(joinings) // 2 :] if row.delta_change > 0]
    if len(half) < 2:
        return None
    changes, tasks = [row.delta_change for row in half], [row.tasks for row in half]
    return float(np.polyfit(np.log(tasks), np.log(changes), 1)[0])


def _winners(before: cx.UnifiedDelta, after: cx.UnifiedDelta) -> Tensor:
    """int16 [N]: position of the task whose delta set the unified delta of `after`, which has one
    task more than `before`. Of old tasks, whose decoupled deltas are λ·u before, that is the one
    with the greatest λ among those whose mask is set; of several the first."""
    winner = torch.full_like(after.delta[NAME], NOBODY, dtype=torch.int16)
    greatest = torch.zeros_like(after.delta[NAME])
    rescaler = rescalers_of(before)
    ascending = sorted(range(len(rescaler)), key=lambda t: (rescaler[t], -t))
    for position in ascending:  # a later one overwrites those that it beats
        mask = after.mask(before.tasks[position])[NAME]
        winner.masked_fill_(mask, position)
        greatest.masked_fill_(mask, float(rescaler[position]))
    old = before.delta[NAME].abs().mul_(greatest)
    return winner.masked_fill_(after.delta[NAME].abs() > old, len(rescaler))


def _compare(
    before: cx.UnifiedDelta, after: cx.UnifiedDelta, winners: Tensor, new_winners: Tensor
) -> Joining:
    u, old_tasks = before.delta[NAME], len(before.tasks)
    moved = u != 0
    elements = int(moved.sum())
    old_masks, new_masks = packed_masks(before), packed_masks(after)[:old_tasks]
    flipped = int(np.bitwise_count(old_masks ^ new_masks).sum())

    def share(count: Tensor | int, whole: int = elements) -> float:
        return int(count) / whole if whole else 0.0

    return Joining(
        tasks=old_tasks + 1,
        elements=elements,
        mask_flips=share(flipped, old_tasks * elements),
        mask_losses=share(flipped, int(np.bitwise_count(old_masks).sum())),
        sign_flips=share((moved & (u.sign() != after.delta[NAME].sign())).sum()),
        winner_changes=share((moved & (winners != new_winners)).sum()),
        won_by_new=share((moved & (new_winners == old_tasks)).sum()),
        delta_change=_delta_change(before, after),
    )


def _delta_change(before: cx.UnifiedDelta, after: cx.UnifiedDelta) -> float:
    """Mean relative L1 change of the decoupled deltas of the tasks of `before` that moved."""
    old, new = torch.empty_like(before.delta[NAME]), torch.empty_like(before.delta[NAME])
    shares = []
    for task in before.tasks:
        cx.decouple_(before, task, None, out={NAME: old})
        cx.decouple_(after, task, None, out={NAME: new})
        if norm := l1(old):
            shares.append(l1(new.sub_(old)) / norm)
    return float(np.mean(shares)) if shares else 0.0
