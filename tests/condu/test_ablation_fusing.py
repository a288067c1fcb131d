"""Fusing with parts exchanged, against condu_ext and against a rebuild in float64."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

import condu_ext as cx
from condu.ablation.fusing import AblatedDelta, Fusing

SHAPES = {"weight": (61, 7), "bias": (61,), "empty": (0, 3), "scale": ()}
Array = NDArray[np.float64]


def deltas(tasks: int, seed: int = 0) -> list[dict[str, Tensor]]:
    """Of different sizes, a third of their elements 0."""
    generator = torch.Generator().manual_seed(seed)
    return [
        {
            name: torch.randn(shape, generator=generator)
            * (torch.rand(shape, generator=generator) > 1 / 3)
            * (1 + task)
            for name, shape in SHAPES.items()
        }
        for task in range(tasks)
    ]


def fused(fusing: Fusing, tasks: Sequence[dict[str, Tensor]], **options: object) -> AblatedDelta:
    result = AblatedDelta(fusing, tasks[0], **options)  # type: ignore[arg-type]
    for delta in tasks:
        result.absorb(delta)
    return result


@pytest.mark.parametrize("zero_sum", ["negative", "positive", "zero"])
@pytest.mark.parametrize("rescale", ["global", "tensor_mean", "per_tensor"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_with_nothing_exchanged_it_is_condu_bit_for_bit(
    zero_sum: str, rescale: str, dtype: torch.dtype
) -> None:
    tasks = deltas(7)
    tasks[3] = {name: -t for name, t in tasks[0].items()}  # ties where only these two moved
    rule = cx.FusionRule(zero_sum=zero_sum, rescale=rescale)  # type: ignore[arg-type]
    state = cx.UnifiedDelta.empty(tasks[0], rule=rule, dtype=dtype)
    mine = AblatedDelta(
        Fusing(zero_sum=zero_sum, rescale=rescale),  # type: ignore[arg-type]
        tasks[0],
        dtype=dtype,
    )
    for t, delta in enumerate(tasks):
        state = cx.absorb(state, str(t), delta, None, backend="reference")
        mine.absorb(delta)
        for name in SHAPES:
            assert torch.equal(mine.delta[name], state.delta[name])
        for old in range(t + 1):
            expected = cx.decouple(state, str(old), None, backend="reference")
            for name, decoupled in mine.decouple(old).items():
                assert torch.equal(mine.masks[old][name], state.mask(str(old))[name])
                assert torch.equal(decoupled, expected[name])


def test_ties_are_counted_against_what_the_new_task_moved() -> None:
    first = {"w": torch.tensor([1.0, 2.0, 0.0, 4.0, 5.0])}
    mine = fused(Fusing(), [first])
    assert (mine.ties, mine.moved) == (0, 4)
    mine.absorb({"w": torch.tensor([-1.0, 2.0, 3.0, 0.0, -5.0])})
    assert (mine.ties, mine.moved) == (2, 4)


# What is exchanged, against the definition: rebuild every delta, look at all of them


def sign_of(kind: str, d: Array, tie: float) -> Array:
    score = d.sum(0) if kind == "sum" else np.sign(d).sum(0)
    return np.where(score == 0, tie, np.sign(score))


def value_of(kind: str, d: Array, sign: Array) -> Array:
    agreeing = np.where(d * sign > 0, np.abs(d), 0)
    if kind == "extreme":
        return sign * agreeing.max(0)
    if kind == "agreeing_mean":
        return sign * agreeing.sum(0) / np.maximum((agreeing > 0).sum(0), 1)
    return sign * np.abs(d.sum(0)) / len(d)


def rebuilt(fusing: Fusing, tasks: Sequence[dict[str, Tensor]]) -> list[dict[str, Array]]:
    """The decoupled deltas after the last task, each session from those of the one before."""
    names = [name for name in SHAPES if np.prod(SHAPES[name]) > 0]
    tie = {"negative": -1.0, "positive": 1.0, "zero": 0.0}[fusing.zero_sum]
    current: list[dict[str, Array]] = []
    for delta in tasks:
        current.append({name: delta[name].double().numpy() for name in names})
        kept: list[dict[str, Array]] = [{} for _ in current]
        for name in names:
            d = np.stack([task[name] for task in current])
            u = value_of(fusing.value, d, sign_of(fusing.sign, d, tie))
            for task, own in zip(kept, d, strict=True):
                task[name] = u * (own * u > 0) if fusing.masks else u
        for own, new in zip(current, kept, strict=True):
            scale = dict.fromkeys(names, 1.0)
            if fusing.rescale != "none":
                weigh = {"tensor_mean": np.mean}.get(fusing.rescale, np.sum)
                num = {name: weigh(np.abs(own[name])) for name in names}
                den = {name: weigh(np.abs(new[name])) for name in names}
                if fusing.rescale == "per_tensor":
                    scale = {n: num[n] / den[n] if den[n] > 0 else 0.0 for n in names}
                else:
                    scale = dict.fromkeys(names, sum(num.values()) / sum(den.values()))
            for name in names:
                own[name] = scale[name] * new[name]
    return current


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"masks": False},
        {"rescale": "none"},
        {"rescale": "tensor_mean"},
        {"rescale": "per_tensor"},
        {"sign": "majority"},
        {"sign": "majority", "zero_sum": "positive"},
        {"value": "agreeing_mean"},
        {"value": "mean"},
        {"masks": False, "rescale": "none", "value": "mean"},
    ],
    ids=str,
)
@pytest.mark.parametrize("tasks", [1, 2, 6])
def test_each_part_is_what_its_definition_says(changes: dict[str, object], tasks: int) -> None:
    fusing = Fusing(**changes)  # type: ignore[arg-type]
    given = deltas(tasks, seed=tasks)
    mine = fused(fusing, given)
    for number, expected in enumerate(rebuilt(fusing, given)):
        found = mine.decouple(number)
        for name, values in expected.items():
            np.testing.assert_allclose(found[name].numpy(), values, rtol=1e-5, atol=1e-6)


def test_the_sign_of_the_sum_and_of_the_majority_differ_where_few_are_large() -> None:
    given = [{"w": torch.tensor([value])} for value in (3.0, -1.0, -1.0)]
    assert fused(Fusing(rescale="none"), given).delta["w"] == 3
    assert fused(Fusing(rescale="none", sign="majority"), given).delta["w"] == -1


def test_plain_averaging_of_all_tasks_at_once_is_their_mean() -> None:
    """Without masks and rescaler every old task is u, so a third task weighs a third again."""
    given = [{"w": torch.tensor([value])} for value in (3.0, -1.0, 7.0)]
    fusing = Fusing(masks=False, rescale="none", value="mean")
    assert fused(fusing, given[:2]).delta["w"] == 1
    assert fused(fusing, given).delta["w"] == 3  # (1 + 1 + 7) / 3


# The sign of a random task


def test_a_random_sign_is_that_of_each_task_equally_often() -> None:
    size = 40000
    given = [{"w": torch.full((size,), value)} for value in (1.0, -5.0, -5.0, 0.0)]
    mine = AblatedDelta(Fusing(sign="random", rescale="none"), given[0], seed=3)
    mine.absorb(given[0])
    mine.absorb(given[1])
    share = (mine.delta["w"] > 0).float().mean().item()
    assert share == pytest.approx(1 / 2, abs=0.02)
    before = mine.delta["w"].clone()
    mine.absorb(given[3])  # a task that did not move has no say
    assert torch.equal(mine.delta["w"], before)
    mine.absorb(given[2])  # against what is positive, with one of two
    share = (mine.delta["w"] > 0).float().mean().item()
    assert share == pytest.approx(1 / 4, abs=0.02)


def test_where_the_unified_delta_is_0_a_random_sign_is_that_of_the_new_task() -> None:
    """Without masks the old task is there at every element."""
    fusing = Fusing(sign="random", masks=False, rescale="none")
    still, moved = {"w": torch.zeros(100)}, {"w": torch.ones(100)}
    assert bool((fused(fusing, [still, moved]).delta["w"] == 1).all())


def test_a_random_sign_keeps_what_all_agree_on_and_repeats_with_its_seed() -> None:
    given = deltas(3)
    agreed = {name: t.abs() for name, t in given[0].items()}
    fusing = Fusing(sign="random")
    mine = fused(fusing, [agreed, agreed])
    assert all(torch.equal(mine.delta[name], agreed[name]) for name in SHAPES)
    first, again, other = (fused(fusing, given, seed=seed).delta["weight"] for seed in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


@pytest.mark.parametrize("field", ["sign", "value", "masks", "rescale"])
def test_no_exchange_leaves_the_result_as_it_was(field: str) -> None:
    other = {"sign": "majority", "value": "mean", "masks": False, "rescale": "none"}[field]
    given = deltas(4)
    default = fused(Fusing(), given).decouple(1)["weight"]
    changed = fused(dataclasses.replace(Fusing(), **{field: other}), given).decouple(1)["weight"]
    assert not torch.allclose(default, changed)


def test_a_task_that_did_not_move_has_the_rescaler_0() -> None:
    given = deltas(2)
    still = {name: torch.zeros_like(t) for name, t in given[0].items()}
    mine = fused(Fusing(masks=False), [given[0], still, given[1]])
    assert not mine.rescaler[1].any()
    assert not any(t.any() for t in mine.decouple(1).values())
