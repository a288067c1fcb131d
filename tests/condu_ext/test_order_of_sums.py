"""The roundings that decide an election: which sums are formed, in which order, rounded when.

An order or an FMA shows only where a total nearly vanishes. So the last term is made the exact
negative of what the others must add up to, in NumPy float32 step by step: with zero_sum="zero"
every element must then be a tie. Another order, or a product not rounded, leaves a remainder.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from condu_ext import _ops, reference

ZERO = 2
NUMEL = 3000
Vector = NDArray[np.float32]


@pytest.fixture(params=["kernels", "reference", "emulated"])
def ops(request: pytest.FixtureRequest) -> Any:
    """The CPU's kernels, their specification, and the CUDA kernels run on the CPU."""
    if request.param == "emulated":
        return request.getfixturevalue("emulated")
    return {"kernels": _ops, "reference": reference}[request.param]


def floats(*shape: int, seed: int = 0) -> Vector:
    values: Vector = np.random.default_rng(seed).standard_normal(shape).astype(np.float32)
    return values


def arena(values: Vector) -> Tensor:
    padded = torch.zeros((len(values) + 511) // 512 * 512)
    padded[: len(values)] = torch.from_numpy(values)
    return padded


def random_planes(tasks: int, seed: int) -> tuple[list[NDArray[np.bool_]], list[Tensor]]:
    masks = list(np.random.default_rng(seed).random((tasks, NUMEL)) < 0.7)
    padding = (0, -NUMEL % 512)
    planes = [np.packbits(np.pad(m, padding), bitorder="little") for m in masks]
    return masks, [torch.from_numpy(p) for p in planes]


def in_groups(terms: list[Vector], size: int) -> Vector:
    """Sum in task order inside groups of ``size``, then of the groups in order."""
    total = np.zeros(NUMEL, dtype=np.float32)
    for first in range(0, len(terms), size):
        group = np.zeros(NUMEL, dtype=np.float32)
        for term in terms[first : first + size]:
            group = group + term
        total = total + group
    return total


def old_tasks(tasks: int, seed: int) -> tuple[list[Vector], list[Tensor], Tensor]:
    """Per task λ·M, the planes, and the rescalers."""
    rescalers = np.random.default_rng(seed).uniform(0.2, 1.8, tasks).astype(np.float32)
    masks, planes = random_planes(tasks, seed + 1)
    terms = [np.where(m, r, np.float32(0)) for m, r in zip(masks, rescalers, strict=True)]
    return terms, planes, torch.from_numpy(rescalers).view(tasks, 1)


def assert_all_tied(u: Tensor, planes: list[Tensor]) -> None:
    assert not u.any()
    assert not any(plane.any() for plane in planes)


@pytest.mark.parametrize("tasks", [2, 3, 4, 5, 8, 13])
def test_unify_adds_in_task_order(ops: Any, tasks: int) -> None:
    deltas = list(floats(tasks - 1, NUMEL))
    total = deltas[0]
    for delta in deltas[1:]:
        total = total + delta
    deltas.append(-total)
    models = [torch.from_numpy(d) for d in deltas]
    u, planes, _ = ops.unify(models, [], tasks, ZERO, torch.float32, [])
    assert_all_tied(u, planes)
    if tasks > 3:  # or nothing was tested: another order gives another total
        other = in_groups(deltas[:-1][::-1], 99)
        assert (other != total).any()


@pytest.mark.parametrize("tasks", [1, 2, 4, 5, 7, 8, 9, 12, 17, 20])
def test_absorb_adds_rescalers_in_groups_of_four(ops: Any, tasks: int) -> None:
    """total = fl(fl(u·S) + d), and S in groups of four tasks."""
    u = floats(NUMEL, seed=tasks)
    terms, planes, rescalers = old_tasks(tasks, seed=10 * tasks)
    total = in_groups(terms, 4)
    delta = torch.from_numpy(-(u * total))
    new_u, new_planes, _ = ops.absorb(arena(u), planes, rescalers, [delta], [], ZERO, [])
    assert_all_tied(new_u, new_planes)
    if tasks > 8:  # or nothing was tested: groups of another size give another total
        for size in (2, 3, 8, 99):
            assert (in_groups(terms, size) != total).any()


def test_absorb_rounds_the_product(ops: Any) -> None:
    """An FMA would keep what rounding u·S lost, and elect its sign."""
    u = floats(NUMEL)
    terms, planes, rescalers = old_tasks(1, seed=3)
    product = u.astype(np.float64) * terms[0]
    assert (product != (u * terms[0]).astype(np.float64)).mean() > 0.5
    delta = torch.from_numpy(-(u * terms[0]))
    assert_all_tied(*ops.absorb(arena(u), planes, rescalers, [delta], [], ZERO, [])[:2])


@pytest.mark.parametrize(("left", "right"), [(1, 1), (5, 1), (9, 1), (1, 6)])
def test_merge_rounds_both_products(ops: Any, left: int, right: int) -> None:
    """total = fl(fl(a·S_a) + fl(b·S_b)), with a single mask of ones on the side that is solved."""
    many = max(left, right)
    u = floats(NUMEL, seed=4)
    terms, planes, rescalers = old_tasks(many, seed=many)
    everywhere = np.pad(np.ones(NUMEL, dtype=bool), (0, -NUMEL % 512))
    plane = torch.from_numpy(np.packbits(everywhere, bitorder="little"))
    other = (arena(-(u * in_groups(terms, 4))), [plane], torch.ones(1, 1))
    sides = ((arena(u), planes, rescalers), other)
    first, second = sides if left >= right else sides[::-1]
    merged_u, merged_planes, _ = ops.merge(*first, *second, [NUMEL], ZERO)
    assert_all_tied(merged_u, merged_planes)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_decouple_rounds_the_product(ops: Any, dtype: torch.dtype) -> None:
    """θ_0 = −fl(λ·u): what is left is exactly +0; an FMA would leave the rounding error."""
    u, rescaler = floats(NUMEL, seed=6), np.float32(1.2345678)
    ones = torch.full(((NUMEL + 511) // 512 * 64,), 255, dtype=torch.uint8)
    base = torch.from_numpy(-(rescaler * u))
    out = torch.full((NUMEL,), torch.nan, dtype=dtype)
    ops.decouple_([out], arena(u), ones, torch.tensor([rescaler]), [base], [])
    assert not out.any()
    assert not out.signbit().any()
