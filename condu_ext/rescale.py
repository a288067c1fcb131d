"""From sums to rescalers: λ_i = Σ|d_i| / Σ M_i·|u|, and what the degenerate cases mean.

Sums of tensors are added with ``math.fsum``, which is exactly rounded: the order of the tensors
and the way they are spread over devices cannot matter.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence

import torch
from torch import Tensor

from condu_ext.layout import Arena, ModelSpec
from condu_ext.rule import FusionRule

_LARGEST = torch.finfo(torch.float32).max


def check_finite(num: Tensor, tasks: Sequence[str], names: Sequence[str]) -> None:
    """Refuse NaN and infinity, which show in the sums: ``num`` is float64 [tasks, tensors].

    Raises:
        ValueError: naming the first task and tensor.
    """
    bad = torch.nonzero(~torch.isfinite(num))
    if len(bad):
        task, tensor = bad[0].tolist()
        raise ValueError(
            f"task {tasks[task]!r}, tensor {names[tensor]!r}: the model or its difference from "
            "the base has NaN or infinite values"
        )


def _quotient(num: float, den: float) -> float:
    """λ, never NaN or infinite; 0 for a task that did not move or was outvoted everywhere."""
    return min(num / den, _LARGEST) if num > 0 and den > 0 else 0.0


def rescalers(rule: FusionRule, num: Tensor, den: Tensor, numels: Sequence[int]) -> Tensor:
    """λ per task and tensor, float32 [tasks, tensors], from sums in float64 of the same shape.

    The three kinds of ``rule.rescale`` are the paper's formula over all elements, the authors'
    code (sums of per-tensor means, empty tensors left out), and one λ a tensor.
    """
    table = torch.zeros(num.shape, dtype=torch.float32, device="cpu")
    weights = [1.0] * len(numels)
    if rule.rescale == "tensor_mean":
        weights = [1.0 / n if n else 0.0 for n in numels]
    for t, (nums, dens) in enumerate(zip(num.tolist(), den.tolist(), strict=True)):
        if rule.rescale == "per_tensor":
            lambdas = [_quotient(n, d) for n, d in zip(nums, dens, strict=True)]
            table[t] = torch.tensor(lambdas, dtype=torch.float32, device="cpu")
        else:
            total_num, total_den = (
                math.fsum(x * w for x, w in zip(sums, weights, strict=True))
                for sums in (nums, dens)
            )
            table[t] = _quotient(total_num, total_den)
    return table


def apply_rescalers(
    spec: ModelSpec,
    arenas: Sequence[Arena],
    rule: FusionRule,
    tasks: Sequence[str],
    alive: Sequence[bool],
) -> list[str]:
    """Set the rescalers of all arenas from their sums, and clear the masks of dead tasks.

    A task (with ``per_tensor``, a task's tensor) whose every element was outvoted, den = 0 < num,
    gets λ = 0 and no mask bits, and stays so.

    Returns:
        The tasks that died just now, of those that were ``alive``: :func:`warn_of` names them to
        the user once the new state is complete, for a warning may be an exception.
    """
    columns = [k for arena in arenas for k in arena.index]
    inverse = torch.tensor(columns, dtype=torch.long, device="cpu").argsort()
    num = torch.cat([arena.num for arena in arenas], dim=1)[:, inverse]
    den = torch.cat([arena.den for arena in arenas], dim=1)[:, inverse]
    table = rescalers(rule, num, den, [entry.numel for entry in spec.tensors])
    for arena in arenas:
        arena.rescaler = table[:, list(arena.index)].to(arena.device)
    died = []
    for t, task in enumerate(tasks):
        dead = (table[t] == 0) & (num[t] > 0)
        if not dead.any():
            continue
        for arena in arenas:
            for position, start, numel in zip(arena.index, arena.starts, arena.numels, strict=True):
                if table[t, position] == 0:
                    arena.planes[t][start // 8 : (start + numel + 7) // 8] = 0
        if alive[t] and bool((table[t] == 0).all()):
            died.append(task)
    return died


def warn_of(died: Sequence[str]) -> None:
    """One UserWarning for each task that was outvoted everywhere."""
    for task in died:
        warnings.warn(
            f"task {task!r} was outvoted on every parameter: its rescaler is 0, and it now "
            "equals the pretrained model",
            UserWarning,
            stacklevel=4,
        )
