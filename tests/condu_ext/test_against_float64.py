"""The fusion by explicit rebuild in NumPy float64, written from the paper's formulas alone.

Each old task is decoupled in full, then all are unified with the new one: no factored sums, no
masks of bits, no fp32. fp32 and float64 may elect differently only where the terms nearly cancel,
|total| <= 2**-22 of the sum of their magnitudes; those elements are counted.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

import condu_ext as cx

Vector = NDArray[np.float64]
TIE = {"negative": -1.0, "positive": 1.0, "zero": 0.0}
NEAR = 2.0**-22


@dataclass
class Fused:
    """u, masks and rescalers of one flat tensor, and where fp32 may decide otherwise."""

    u: Vector
    masks: list[NDArray[np.bool_]]
    rescalers: list[float]
    near: NDArray[np.bool_]


def unify64(deltas: list[Vector], zero_sum: str) -> Fused:
    """Elect a sign, keep who agrees, take the extreme value, rescale to the old L1 norm."""
    stacked = np.stack(deltas)
    total = stacked.sum(0)
    flag = np.where(total > 0, 1.0, np.where(total < 0, -1.0, TIE[zero_sum]))
    masks = stacked * flag > 0
    magnitude = np.where(masks, np.abs(stacked), 0.0).max(0)
    rescalers = []
    for delta, mask in zip(stacked, masks, strict=True):
        norm, left = np.abs(delta).sum(), magnitude[mask].sum()
        rescalers.append(float(norm / left) if left > 0 else 0.0)
    near = np.abs(total) <= NEAR * np.abs(stacked).sum(0)
    return Fused(flag * magnitude, list(masks), rescalers, near)


def decouple64(fused: Fused, task: int) -> Vector:
    return fused.rescalers[task] * fused.masks[task] * fused.u


def view64(state: cx.UnifiedDelta) -> Fused:
    """What a state says of its only tensor, in float64."""
    u = state.delta["w"].double().numpy()
    masks = [state.mask(t)["w"].numpy() for t in state.tasks]
    rescalers = [state.rescaler(t) for t in state.tasks]
    return Fused(u, masks, rescalers, np.zeros(len(u), dtype=bool))


def random_deltas(tasks: int, numel: int, seed: int) -> list[torch.Tensor]:
    """Deltas with a tenth of zeros, of magnitudes that differ between tasks."""
    generator = torch.Generator().manual_seed(seed)
    return [
        10.0 ** (-2 - t % 3)
        * torch.randn(numel, generator=generator)
        * (torch.rand(numel, generator=generator) > 0.1)
        for t in range(tasks)
    ]


def assert_agrees(state: cx.UnifiedDelta, expected: Fused, allowed: float) -> None:
    """Masks and u are equal where the sum is no near-tie; rescalers to 1e-5 of each other."""
    clear = ~expected.near
    assert expected.near.sum() <= allowed * len(clear)
    found = view64(state)
    for task, mask, expected_mask in zip(state.tasks, found.masks, expected.masks, strict=True):
        wrong = np.flatnonzero((mask != expected_mask) & clear)
        assert not len(wrong), f"mask of {task} differs at {wrong[:5]}"
    np.testing.assert_allclose(found.u[clear], expected.u[clear], rtol=4e-7, atol=1e-40)
    np.testing.assert_allclose(found.rescalers, expected.rescalers, rtol=1e-5)


@pytest.mark.parametrize("zero_sum", ["negative", "positive", "zero"])
@pytest.mark.parametrize("tasks", [1, 2, 3, 7, 12])
def test_unify(tasks: int, zero_sum: str) -> None:
    deltas = random_deltas(tasks, 5003, seed=tasks)
    rule = cx.FusionRule(zero_sum=zero_sum)
    state = cx.unify({f"t{k}": {"w": d} for k, d in enumerate(deltas)}, None, rule=rule)
    expected = unify64([d.double().numpy() for d in deltas], zero_sum)
    if tasks == 1:
        expected.near[:] = False  # nothing to round: zeros of one task are exact
    # Elements that no task moved count as near; with two tasks that is a hundredth.
    assert_agrees(state, expected, allowed=0.02)


@pytest.mark.parametrize("zero_sum", ["negative", "positive", "zero"])
def test_unify_with_exact_ties(zero_sum: str) -> None:
    """Small integers: every sum is exact in fp32, so nothing is left out of the comparison."""
    generator = torch.Generator().manual_seed(0)
    deltas = [torch.randint(-3, 4, (4001,), generator=generator).float() for _ in range(6)]
    rule = cx.FusionRule(zero_sum=zero_sum)
    state = cx.unify({f"t{k}": {"w": d} for k, d in enumerate(deltas)}, None, rule=rule)
    expected = unify64([d.double().numpy() for d in deltas], zero_sum)
    ties = np.stack([d.double().numpy() for d in deltas]).sum(0) == 0
    assert ties.sum() > 200
    expected.near[:] = False
    assert_agrees(state, expected, allowed=0.0)


@pytest.mark.parametrize("zero_sum", ["negative", "zero"])
@pytest.mark.parametrize("seed", [0, 1])
def test_each_absorb_is_decouple_then_unify(seed: int, zero_sum: str) -> None:
    """Twelve tasks one after another; each step is compared given the same incoming state."""
    deltas = random_deltas(12, 5003, seed)
    template = {"w": torch.zeros(5003)}
    state = cx.UnifiedDelta.empty(template, rule=cx.FusionRule(zero_sum=zero_sum))
    near = 0
    for k, delta in enumerate(deltas):
        before = view64(state)
        rebuilt = [decouple64(before, t) for t in range(k)]
        new = delta.double().numpy()
        expected = unify64([*rebuilt, new], zero_sum)
        untouched = np.all(np.stack([*rebuilt, new]) == 0, axis=0)
        expected.near &= ~untouched
        near += int(expected.near.sum())
        state = cx.absorb(state, f"t{k}", {"w": delta}, None)
        assert_agrees(state, expected, allowed=0.001)
    assert near <= 5


def test_a_whole_sequence() -> None:
    """Twelve absorbs against twelve rebuilds that never see the state: errors do not build up."""
    numel, tasks = 20011, 12
    deltas = random_deltas(tasks, numel, seed=3)
    state = cx.UnifiedDelta.empty({"w": torch.zeros(numel)})
    fused = Fused(np.zeros(numel), [], [], np.zeros(numel, dtype=bool))
    for k, delta in enumerate(deltas):
        state = cx.absorb(state, f"t{k}", {"w": delta}, None)
        rebuilt = [decouple64(fused, t) for t in range(k)]
        fused = unify64([*rebuilt, delta.double().numpy()], "negative")
    found = view64(state)
    different = np.zeros(numel, dtype=bool)
    for mask, expected in zip(found.masks, fused.masks, strict=True):
        different |= mask != expected
    assert different.sum() <= 5
    np.testing.assert_allclose(found.u[~different], fused.u[~different], rtol=1e-5, atol=1e-40)
    np.testing.assert_allclose(found.rescalers, fused.rescalers, rtol=1e-5)


def test_a_hundred_tasks() -> None:
    """Each step as above, given the same state, and the end against a hundred rebuilds that never
    see it: λ to 1e-5, masks in all but the elements counted here."""
    numel, tasks = 4001, 100
    state = cx.UnifiedDelta.empty({"w": torch.zeros(numel)})
    fused = Fused(np.zeros(numel), [], [], np.zeros(numel, dtype=bool))
    near = 0
    for k, delta in enumerate(random_deltas(tasks, numel, seed=8)):
        before, new = view64(state), delta.double().numpy()
        expected = unify64([*(decouple64(before, t) for t in range(k)), new], "negative")
        expected.near &= (before.u != 0) | (new != 0)
        near += int(expected.near.sum())
        state = cx.absorb(state, f"t{k}", {"w": delta}, None)
        assert_agrees(state, expected, allowed=0.001)
        fused = unify64([*(decouple64(fused, t) for t in range(k)), new], "negative")
    assert near <= 5
    found = view64(state)
    different = np.stack([a != b for a, b in zip(found.masks, fused.masks, strict=True)]).any(0)
    assert different.sum() <= 5
    np.testing.assert_allclose(found.u[~different], fused.u[~different], rtol=1e-5, atol=1e-40)
    np.testing.assert_allclose(found.rescalers, fused.rescalers, rtol=1e-5)


def test_merge() -> None:
    """Two states merged are the union of their decoupled deltas, unified."""
    deltas = random_deltas(7, 5003, seed=5)
    named = [(f"t{k}", {"w": d}) for k, d in enumerate(deltas)]
    a, b = cx.unify(dict(named[:4]), None), cx.unify(dict(named[4:]), None)
    rebuilt = [decouple64(view64(s), t) for s in (a, b) for t in range(len(s.tasks))]
    expected = unify64(rebuilt, "negative")
    expected.near &= ~np.all(np.stack(rebuilt) == 0, axis=0)
    assert_agrees(cx.merge(a, b), expected, allowed=0.001)


def test_the_unified_delta_is_a_maximum() -> None:
    """Not a sum: the bug that EMR-Merging shipped, ``max += |d|``, would give 6 and λ = 1/3."""
    deltas = {f"t{k}": {"w": torch.full((9,), 2.0)} for k in range(3)}
    state = cx.unify(deltas, None)
    assert state.delta["w"].tolist() == [2.0] * 9
    assert state.rescaler("t0") == 1.0
    state = cx.absorb(state, "t3", {"w": torch.full((9,), 3.0)}, None)
    assert state.delta["w"].tolist() == [3.0] * 9
    assert [state.rescaler(t) for t in state.tasks] == pytest.approx([2 / 3] * 3 + [1.0], rel=1e-7)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_decoupled_weights(dtype: torch.dtype) -> None:
    """θ_0 + λ·M·u: two roundings in fp32, then one to the model's dtype."""
    generator = torch.Generator().manual_seed(1)
    base = torch.randn(3001, generator=generator).to(dtype)
    models = {
        f"t{k}": {"w": (base + 0.02 * torch.randn(3001, generator=generator)).to(dtype)}
        for k in range(4)
    }
    state = cx.unify(models, {"w": base})
    fused = view64(state)
    for k, task in enumerate(state.tasks):
        theta = cx.decouple(state, task, {"w": base})["w"]
        assert theta.dtype == dtype
        moved = decouple64(fused, k)
        exact = base.double().numpy() + moved
        unit = torch.finfo(dtype).eps / 2
        bound = unit * np.abs(exact) + 2.0**-23 * (np.abs(moved) + np.abs(exact))
        bound += torch.finfo(dtype).smallest_normal * unit
        assert (np.abs(theta.double().numpy() - exact) <= bound).all()
        delta = cx.decouple(state, task, None)["w"]
        np.testing.assert_allclose(delta.double().numpy(), moved, rtol=1e-7)
