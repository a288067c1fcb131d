"""Unify and absorb against the straightforward PyTorch, on CLIP ViT-B/16 and eight tasks.

Both sides run in this process on the same weights, and the results are compared before anything is
called faster. Times are medians; memory is the extra resident size at the highest point.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import pytest
import torch
from memory import peak_memory
from pytest_benchmark.fixture import BenchmarkFixture
from torch import Tensor

import condu_ext as cx
import straightforward
from table import Row, Table

Weights = dict[str, Tensor]
BASELINE_ROUNDS = 3
ROUNDS = 9


def seconds(run: Callable[[], Any], rounds: int) -> float:
    """Median time of a call."""
    times = []
    for _ in range(rounds):
        began = time.perf_counter()
        result = run()
        times.append(time.perf_counter() - began)
        del result
    return statistics.median(times)


def rescaler_of(state: cx.UnifiedDelta, task: str) -> float:
    rescaler = state.rescaler(task)
    assert isinstance(rescaler, float)
    return rescaler


def mib(size: int) -> float:
    return size / 2**20


def assert_same(state: cx.UnifiedDelta, expected: straightforward.Unified) -> None:
    """The same unified delta, masks and rescalers, but for elements that tie within rounding."""
    different = total = 0
    for name, u in state.delta.items():
        different += int((u != expected.delta[name]).sum())
        total += u.numel()
    assert different <= 1e-5 * total, f"{different} of {total} elements differ"
    for task, masks, rescaler in zip(state.tasks, expected.masks, expected.rescalers, strict=True):
        own = state.mask(task)
        flipped = sum(int((own[name] != masks[name]).sum()) for name in own)
        assert flipped <= 1e-5 * total, f"{flipped} mask bits of {task} differ"
        assert math.isclose(rescaler_of(state, task), rescaler, rel_tol=1e-5)


@pytest.fixture(scope="module")
def parameters(pretrained: Weights) -> int:
    return sum(tensor.numel() for tensor in pretrained.values())


@pytest.fixture(scope="module")
def seven(finetuned: Mapping[str, Weights], pretrained: Weights) -> cx.UnifiedDelta:
    """A state of the first seven tasks."""
    return cx.unify(dict(list(finetuned.items())[:-1]), pretrained)


def test_copy(parameters: int, table: Table) -> None:
    """What torch's copy of as many fp32 values moves: a mark to hold the rates against."""
    source, target = torch.randn(parameters), torch.empty(parameters)
    target.copy_(source)
    table.copy_rate = 8 * parameters / seconds(lambda: target.copy_(source), ROUNDS) / 1e9
    assert torch.equal(source, target)


def test_unify(
    benchmark: BenchmarkFixture,
    finetuned: Mapping[str, Weights],
    pretrained: Weights,
    parameters: int,
    table: Table,
) -> None:
    models = list(finetuned.values())

    def rebuilt() -> straightforward.Unified:
        return straightforward.unify(straightforward.deltas_of(models, pretrained))

    with peak_memory() as theirs:
        expected = rebuilt()
    assert_same(cx.unify(finetuned, pretrained), expected)
    del expected
    with peak_memory() as ours:
        state = cx.unify(finetuned, pretrained)
    bound = state.nbytes
    del state
    benchmark.pedantic(cx.unify, args=(finetuned, pretrained), rounds=ROUNDS, warmup_rounds=1)
    tasks = len(models)
    table.add(
        Row(
            f"unify {tasks} models",
            benchmark.stats.stats.median,
            seconds(rebuilt, BASELINE_ROUNDS),
            mib(ours.extra),
            mib(theirs.extra),
            parameters * ((tasks + 1) * 4 + 4 + tasks / 8) / 1e9,
        )
    )
    assert ours.extra <= 1.05 * bound, "unify holds more than the new state"


@dataclass
class Rebuilt:
    """What rebuild-then-unify gave for the last task, and what it took."""

    expected: straightforward.Unified
    seconds: float
    extra: int


@pytest.fixture(scope="module")
def rebuilt(
    finetuned: Mapping[str, Weights], pretrained: Weights, seven: cx.UnifiedDelta
) -> Rebuilt:
    model = list(finetuned.values())[-1]
    rescalers = [rescaler_of(seven, task) for task in seven.tasks]
    old = straightforward.Unified(seven.delta, [seven.mask(t) for t in seven.tasks], rescalers)
    with peak_memory() as theirs:
        expected = straightforward.absorb(old, model, pretrained)
    taken = seconds(partial(straightforward.absorb, old, model, pretrained), BASELINE_ROUNDS)
    return Rebuilt(expected, taken, theirs.extra)


@pytest.mark.parametrize("in_place", [False, True], ids=["new state", "in place"])
def test_absorb(
    benchmark: BenchmarkFixture,
    finetuned: Mapping[str, Weights],
    pretrained: Weights,
    seven: cx.UnifiedDelta,
    rebuilt: Rebuilt,
    parameters: int,
    table: Table,
    in_place: bool,
) -> None:
    task, model = list(finetuned.items())[-1]
    if in_place:
        states: list[cx.UnifiedDelta] = []

        def fresh() -> tuple[tuple[Any, ...], dict[str, Any]]:
            states[:] = [seven.to("cpu")]
            return (states[0], task, model, pretrained), {}

        arguments, _ = fresh()
        with peak_memory() as ours:
            cx.absorb_(*arguments)
        assert_same(states[0], rebuilt.expected)
        bound = parameters // 8  # one bit a parameter
        benchmark.pedantic(cx.absorb_, setup=fresh, rounds=ROUNDS)
    else:
        with peak_memory() as ours:
            state = cx.absorb(seven, task, model, pretrained)
        assert_same(state, rebuilt.expected)
        bound = state.nbytes
        del state
        benchmark.pedantic(
            cx.absorb, args=(seven, task, model, pretrained), rounds=ROUNDS, warmup_rounds=1
        )
    tasks = len(seven.tasks)
    table.add(
        Row(
            f"absorb task {tasks + 1}, {'in place' if in_place else 'new state'}",
            benchmark.stats.stats.median,
            rebuilt.seconds,
            mib(ours.extra),
            mib(rebuilt.extra),
            # absorb_ reads the inputs once more, to check them before it writes
            parameters * (4 * 4 + (2 * tasks + 1) / 8 + (8 if in_place else 0)) / 1e9,
        )
    )
    slack = 8 << 20  # the allocator's and the interpreter's own, whatever the model's size
    assert ours.extra <= bound + slack, f"{ours.extra:,} bytes above {bound:,}"


def test_decouple(
    benchmark: BenchmarkFixture,
    pretrained: Weights,
    seven: cx.UnifiedDelta,
    parameters: int,
    table: Table,
) -> None:
    task = seven.tasks[3]
    live = {name: value.clone() for name, value in pretrained.items()}
    masks, u, rescaler = seven.mask(task), seven.delta, rescaler_of(seven, task)

    def straight() -> dict[str, Tensor]:
        return {name: pretrained[name] + rescaler * masks[name] * u[name] for name in u}

    with peak_memory() as theirs:
        expected = straight()
    with peak_memory() as ours:
        cx.decouple_(seven, task, pretrained, out=live)
    assert all(torch.equal(live[name], expected[name]) for name in expected)
    del expected
    benchmark.pedantic(
        cx.decouple_,
        args=(seven, task, pretrained),
        kwargs={"out": live},
        rounds=ROUNDS,
        warmup_rounds=1,
    )
    table.add(
        Row(
            "decouple into a live model",
            benchmark.stats.stats.median,
            seconds(straight, BASELINE_ROUNDS),
            mib(ours.extra),
            mib(theirs.extra),
            parameters * (12 + 1 / 8) / 1e9,
        )
    )
