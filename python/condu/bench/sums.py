"""Are the sums and rescalers of a result right? Against float64, from inputs and result.

Σ|d| comes from the models, Σ M·|u| from the masks and the unified delta that the kernel has
stored. Whole tensors: the largest, whose sums have the most chunks, and then from the smallest on.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

import condu_ext as cx
from condu.bench.baselines.base import rescaler_of
from condu.bench.check import SAMPLE, WrongResult
from condu_ext.reference import unpack_bits

PART = 1 << 20
"""Elements that are converted to float64 at a time: a multiple of 8."""
CLOSE = 1e-6


def require_sums(state: cx.UnifiedDelta, norm: Callable[[str, str], float], what: str) -> None:
    """Check Σ|d|, Σ M·|u| and λ of every task to :data:`CLOSE`.

    Args:
        norm: Σ|d| of a task and a tensor, as it has to be.

    Raises:
        WrongResult: naming the task and the tensor.
    """
    delta, found = state.delta, sums_of(state)
    chosen = summed_tensors({name: u.numel() for name, u in delta.items()})
    for task in state.tasks:
        packed = state.packed_mask(task)
        for name in chosen:
            num, den = found[task, name]
            where = f"{what}, tensor {name}: {task}"
            _require_close(num, norm(task, name), f"{where}: sum of |d|")
            _require_close(den, _masked_norm(delta[name], packed[name]), f"{where}: sum of M|u|")
        num, den = (
            math.fsum(found[key][row] for key in found if key[0] == task) for row in range(2)
        )
        expected = num / den if den else 0.0
        _require_close(rescaler_of(state, task), expected, f"{what}: rescaler of {task}")


def sums_of(state: cx.UnifiedDelta) -> dict[tuple[str, str], tuple[float, float]]:
    """Σ|d| and Σ M·|u| that a state holds, by task and tensor."""
    found = {}
    for arena in state.arenas:
        for t, task in enumerate(state.tasks):
            for position, num, den in zip(
                arena.index, arena.num[t].tolist(), arena.den[t].tolist(), strict=True
            ):
                found[task, state.spec.tensors[position].name] = num, den
    return found


def norm_of(model: Tensor, base: Tensor) -> float:
    """Σ|θ − θ_0|: differences in float32, as the rule has them, added in float64."""
    total = torch.zeros((), dtype=torch.float64, device=model.device)
    for theta, theta_0 in zip(model.view(-1).split(PART), base.view(-1).split(PART), strict=True):
        total += (theta.float() - theta_0.float()).abs().sum(dtype=torch.float64)
    return float(total)


def _masked_norm(u: Tensor, packed: Tensor) -> float:
    total = torch.zeros((), dtype=torch.float64, device=u.device)
    for values, bits in zip(u.view(-1).split(PART), packed.split(PART // 8), strict=True):
        mask = unpack_bits(bits, len(values))
        total += torch.where(mask, values.float().abs(), 0.0).sum(dtype=torch.float64)
    return float(total)


def summed_tensors(sizes: Mapping[str, int]) -> list[str]:
    """The largest tensor, then from the smallest on until they have :data:`SAMPLE` elements."""
    smallest_first = sorted(sizes, key=lambda name: sizes[name])
    chosen = smallest_first[-1:]
    total = 0
    for name in smallest_first[:-1]:
        total += sizes[name]
        if total > SAMPLE:
            break
        chosen.append(name)
    return chosen


def _require_close(ours: float, expected: float, what: str) -> None:
    if not math.isclose(ours, expected, rel_tol=CLOSE):
        raise WrongResult(f"{what} is {ours}, in float64 {expected}")
