"""Elements whose deltas add up to exactly zero: counted from two runs of the kernels."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from kernel_cases import BF16, DTYPES, F32, make_case
from range_operators import RULES
from torch import Tensor

import condu_ext as cx
from condu_ext import ranges
from condu_ext.ranges import StateRange
from condu_ext.reference import unpack_bits


def count(
    write: Callable[[StateRange, cx.FusionRule], Any],
    numels: list[int],
    tasks: int,
    dtype: torch.dtype,
    rule: cx.FusionRule,
) -> list[int]:
    """What zero_sums finds after a call under both rules."""
    out, other = (StateRange.empty(numels, tasks, dtype) for _ in range(2))
    write(out, rule)
    write(other, ranges.opposite(rule))
    return ranges.zero_sums(out, other, numels).tolist()


@pytest.mark.parametrize("dtype", [F32, BF16])
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("tasks", [1, 2, 6])
def test_zero_sums_of_exact_terms(tasks: int, rule: cx.FusionRule, dtype: torch.dtype) -> None:
    """Small integers, whose sums float64 has exactly, too."""
    generator = torch.Generator().manual_seed(0)
    numels = [4001, 0, 5, 70000]
    models = [
        [torch.randint(-3, 4, (n,), generator=generator).float() for n in numels]
        for _ in range(tasks)
    ]
    expected = []
    for tensors in zip(*models, strict=True):
        terms = np.stack([t.double().numpy() for t in tensors])
        expected.append(int(((terms.sum(0) == 0) & terms.any(0)).sum()))
    assert (sum(expected) > 5000) == (tasks > 1)
    found = count(
        lambda out, r: ranges.unify(models, None, out, rule=r), numels, tasks, dtype, rule
    )
    assert found == expected


@pytest.mark.parametrize("dtype", [F32, BF16])
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("kind", list(DTYPES))
def test_zero_sums_of_models(kind: str, rule: cx.FusionRule, dtype: torch.dtype) -> None:
    """fp32 sums in the order of the tasks, subnormal deltas included."""
    case = make_case((65536 + 9, 300), 4, kind)
    models = case.models[:4]
    expected = []
    for k, start in enumerate(case.base):
        deltas = [model[k].float() - start.float() for model in models]
        total = ((deltas[0] + deltas[1]) + deltas[2]) + deltas[3]
        moved = torch.stack(deltas).any(0)
        expected.append(int(((total == 0) & moved).sum()))
    assert min(expected) > 0
    found = count(
        lambda out, r: ranges.unify(models, case.base, out, rule=r), case.numels, 4, dtype, rule
    )
    assert found == expected


def terms_of(state: StateRange, rescaler: Tensor, start: int, numel: int) -> Tensor:
    """u·S of one tensor, for up to four tasks."""
    masks = [unpack_bits(p[start // 8 : (start + numel + 7) // 8], numel) for p in state.planes]
    S = torch.zeros(numel)
    for mask, scale in zip(masks, rescaler.view(-1), strict=True):
        S = S + torch.where(mask, scale, 0.0)
    return state.u[start : start + numel].float() * S


@pytest.mark.parametrize("dtype", [F32, BF16])
@pytest.mark.parametrize("rule", RULES)
def test_zero_sums_of_absorb_and_merge(rule: cx.FusionRule, dtype: torch.dtype) -> None:
    """A third of the new deltas undo the old ones; another third are 0."""
    numel = 70001
    case = make_case((numel,), 5, "fp32", dtype)
    deltas = [[(m[0] - case.base[0]) * (case.base[0] != 0)] for m in case.models]  # none subnormal
    a, b = (StateRange.empty([numel], tasks, dtype) for tasks in (3, 1))
    scale_a, scale_b = torch.tensor([[1.0], [0.7], [0.3]]), torch.ones(1, 1)
    ranges.unify(deltas[:3], None, a, rule=rule)
    old = terms_of(a, scale_a, 0, numel)
    new = torch.where(torch.arange(numel) % 3 == 0, -old, deltas[4][0]).to(dtype).float()
    new[1::3] = 0
    expected = int(((old + new == 0) & (new != 0)).sum())
    assert expected > 1000

    def absorb(out: StateRange, rule: cx.FusionRule) -> None:
        ranges.absorb(a, scale_a, [new], None, out, rule=rule)

    def merge(out: StateRange, rule: cx.FusionRule) -> None:
        ranges.merge(a, scale_a, b, scale_b, [numel], out, rule=rule)

    ranges.unify([[new]], None, b, rule=rule)
    assert torch.equal(terms_of(b, scale_b, 0, numel), new)
    assert count(absorb, [numel], 4, dtype, rule) == [expected]
    assert count(merge, [numel], 4, dtype, rule) == [expected]


@pytest.mark.parametrize("rule", RULES)
def test_zero_sums_where_the_unified_delta_underflows(rule: cx.FusionRule) -> None:
    """Deltas that a bf16 state stores as zero are still in the election."""
    tiny = [[torch.full((40,), 2.0**-140)], [torch.full((40,), -(2.0**-140))]]
    found = count(lambda out, r: ranges.unify(tiny, None, out, rule=r), [40], 2, BF16, rule)
    assert found == [40]
