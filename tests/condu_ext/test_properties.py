"""What must hold for any deltas: properties of the fusion, with examples drawn by hypothesis."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst
from kernel_cases import same_bytes
from torch import Tensor

import condu_ext as cx

Delta = dict[str, Tensor]
RULES = [
    cx.FusionRule(zero_sum=z, rescale=r)
    for z in ("negative", "positive", "zero")
    for r in ("global", "tensor_mean", "per_tensor")
]


@pytest.fixture(autouse=True)
def no_warnings_for_outvoted_tasks() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        yield


def ordinary() -> st.SearchStrategy[float]:
    """Zeros and numbers whose products and sums stay normal in fp32, ties included."""
    size = st.floats(2.0**-20, 2.0**20, width=32)
    small = st.integers(1, 4).map(float)
    return st.one_of(
        st.just(0.0), st.just(-0.0), small, small.map(lambda x: -x), size, size.map(lambda x: -x)
    )


def extreme() -> st.SearchStrategy[float]:
    """Every fp32 number whose sums do not overflow, subnormals included."""
    return st.floats(-(2.0**100), 2.0**100, width=32)


def integers() -> st.SearchStrategy[float]:
    return st.integers(-4, 4).map(float)


@st.composite
def delta_sets(
    draw: st.DrawFn, elements: st.SearchStrategy[float], low: int = 1, high: int = 6
) -> dict[str, Delta]:
    """Between ``low`` and ``high`` deltas over the same one to three tensors."""
    sizes = draw(st.lists(st.integers(0, 20), min_size=1, max_size=3))
    tasks = draw(st.integers(low, high))
    return {
        f"t{k}": {
            f"w{i}": torch.from_numpy(draw(npst.arrays(np.float32, n, elements=elements)))
            for i, n in enumerate(sizes)
        }
        for k in range(tasks)
    }


def split(deltas: dict[str, Delta], last: int = 1) -> tuple[dict[str, Delta], dict[str, Delta]]:
    names = list(deltas)
    cut = len(names) - last
    return {n: deltas[n] for n in names[:cut]}, {n: deltas[n] for n in names[cut:]}


def sequence(deltas: dict[str, Delta], rule: cx.FusionRule) -> cx.UnifiedDelta:
    state = cx.UnifiedDelta.empty(next(iter(deltas.values())), rule=rule)
    for task, delta in deltas.items():
        state = cx.absorb(state, task, delta, None)
    return state


def assert_same_state(a: cx.UnifiedDelta, b: cx.UnifiedDelta) -> None:
    assert a.tasks == b.tasks
    for name, u in a.delta.items():
        assert same_bytes(u, b.delta[name])
    for task in a.tasks:
        assert a.rescaler(task) == b.rescaler(task)
        for name, mask in a.packed_mask(task).items():
            assert same_bytes(mask, b.packed_mask(task)[name])


def lambdas(state: cx.UnifiedDelta, task: str) -> list[float]:
    value = state.rescaler(task)
    return list(value.values()) if isinstance(value, dict) else [value]


def norm(state: cx.UnifiedDelta, task: str) -> float:
    return sum(float(d.double().abs().sum()) for d in cx.decouple(state, task, None).values())


@given(delta_sets(ordinary(), low=2), st.sampled_from(RULES))
def test_absorb_is_merge_with_a_state_of_one_task(
    deltas: dict[str, Delta], rule: cx.FusionRule
) -> None:
    old, new = split(deltas)
    state = cx.unify(old, None, rule=rule)
    (task, delta), *_ = new.items()
    absorbed = cx.absorb(state, task, delta, None)
    assert_same_state(absorbed, cx.merge(state, cx.unify(new, None, rule=rule)))
    cx.absorb_(state, task, delta, None)
    assert_same_state(absorbed, state)


@given(delta_sets(ordinary()), st.sampled_from(RULES))
def test_one_unify_is_the_same_in_the_reference(
    deltas: dict[str, Delta], rule: cx.FusionRule
) -> None:
    """Through the API: masks, unified deltas, and rescalers to 4 ulp."""
    state = cx.unify(deltas, None, rule=rule)
    other = cx.unify(deltas, None, rule=rule, backend="reference")
    for name, u in state.delta.items():
        assert same_bytes(u, other.delta[name])
    for task in state.tasks:
        assert lambdas(state, task) == pytest.approx(lambdas(other, task), rel=4 * 2.0**-23)
        for name, mask in state.packed_mask(task).items():
            assert same_bytes(mask, other.packed_mask(task)[name])


@given(delta_sets(ordinary(), low=2), st.sampled_from(RULES))
def test_masks_of_old_tasks_only_shrink(deltas: dict[str, Delta], rule: cx.FusionRule) -> None:
    state = cx.UnifiedDelta.empty(deltas["t0"], rule=rule)
    for task, delta in deltas.items():
        before = {t: state.mask(t) for t in state.tasks}
        state = cx.absorb(state, task, delta, None)
        for old, masks in before.items():
            for name, mask in masks.items():
                assert not (state.mask(old)[name] & ~mask).any()


@given(delta_sets(ordinary(), low=2), st.sampled_from(["negative", "positive", "zero"]))
def test_the_norm_of_a_decoupled_delta_is_invariant(
    deltas: dict[str, Delta], zero_sum: str
) -> None:
    """‖d̃‖₁ stays ‖d‖₁ for as long as the task lives; a task that died stays at 0."""
    state = sequence(deltas, cx.FusionRule(zero_sum=zero_sum))
    for task, delta in deltas.items():
        found = norm(state, task)
        if state.rescaler(task) == 0:
            assert found == 0
        else:
            expected = sum(float(d.double().abs().sum()) for d in delta.values())
            assert found == pytest.approx(expected, rel=1e-6)


@given(delta_sets(extreme(), high=1), st.sampled_from(RULES))
def test_one_task_is_exact(deltas: dict[str, Delta], rule: cx.FusionRule) -> None:
    state = cx.unify(deltas, None, rule=rule)
    decoupled = cx.decouple(state, "t0", None)
    for name, d in deltas["t0"].items():
        assert same_bytes(decoupled[name], torch.where(d == 0, 0.0, d))
    moved = [bool(d.any()) for d in deltas["t0"].values()]
    if rule.rescale == "per_tensor":
        assert lambdas(state, "t0") == [float(m) for m in moved]
    else:
        assert state.rescaler("t0") == float(any(moved))
    assert_same_state(state, sequence(deltas, rule))


@given(delta_sets(ordinary(), low=2, high=2))
def test_one_expert_is_its_model_within_one_rounding(deltas: dict[str, Delta]) -> None:
    """θ̃ = θ_0 + fl(θ − θ_0), rounded: the error of one subtraction and one addition."""
    base, theta = deltas["t0"], deltas["t1"]
    expert = cx.decouple(cx.unify({"t": theta}, base), "t", base)
    for name, value in theta.items():
        exact, start = value.double(), base[name].double()
        bound = 2.0**-24 * ((exact - start).abs() + exact.abs()) * (1 + 1e-6)
        assert ((expert[name].double() - exact).abs() <= bound).all()


BEYOND = {  # λ of t0 is 1e30 over 1e-40
    "t0": {"w0": torch.tensor([1e30, 1e-40])},
    "t1": {"w0": torch.tensor([-1.2e30, 0.0])},
}


@given(delta_sets(extreme(), low=2), st.sampled_from(RULES), st.booleans())
@example(BEYOND, RULES[0], True)
@example(BEYOND, RULES[0], False)
def test_rescalers_are_finite(deltas: dict[str, Delta], rule: cx.FusionRule, at_once: bool) -> None:
    state = cx.unify(deltas, None, rule=rule) if at_once else sequence(deltas, rule)
    for task in state.tasks:
        for value in lambdas(state, task):
            assert math.isfinite(value)
            assert value >= 0
        for tensor in cx.decouple(state, task, None).values():
            assert tensor.isfinite().all()


@given(delta_sets(integers(), low=2), st.sampled_from(RULES), st.randoms(use_true_random=False))
def test_order_does_not_matter_where_sums_are_exact(
    deltas: dict[str, Delta], rule: cx.FusionRule, random: object
) -> None:
    names = list(deltas)
    random.shuffle(names)  # type: ignore[attr-defined]
    a = cx.unify(deltas, None, rule=rule)
    b = cx.unify({n: deltas[n] for n in names}, None, rule=rule)
    assert b.tasks == tuple(names)
    for name, u in a.delta.items():
        assert same_bytes(u, b.delta[name])
    for task in deltas:
        assert a.rescaler(task) == b.rescaler(task)
        for name, mask in a.mask(task).items():
            assert torch.equal(mask, b.mask(task)[name])


@given(delta_sets(ordinary(), low=2, high=2), st.sampled_from(RULES))
def test_two_tasks_commute(deltas: dict[str, Delta], rule: cx.FusionRule) -> None:
    a = cx.unify(deltas, None, rule=rule)
    b = cx.unify(dict(reversed(deltas.items())), None, rule=rule)
    for name, u in a.delta.items():
        assert same_bytes(u, b.delta[name])
    assert [a.rescaler(t) for t in a.tasks] == [b.rescaler(t) for t in a.tasks]


def test_order_matters_where_the_formula_says_so() -> None:
    """(1 + 1e8) − 1e8 is 0 in fp32, (1e8 − 1e8) + 1 is 1: sums are not re-associated."""
    deltas = {"a": 1.0, "b": 1e8, "c": -1e8}

    def u(*order: str) -> float:
        models = {t: {"w": torch.tensor([deltas[t]])} for t in order}
        return float(cx.unify(models, None).delta["w"])

    assert u("a", "b", "c") == -1e8
    assert u("b", "c", "a") == 1e8


@given(delta_sets(ordinary(), low=2), st.sampled_from(["negative", "positive", "zero"]))
def test_absorb_is_decouple_then_unify(deltas: dict[str, Delta], zero_sum: str) -> None:
    """Equal where the terms do not nearly cancel."""
    rule = cx.FusionRule(zero_sum=zero_sum)
    old, new = split(deltas)
    state = cx.unify(old, None, rule=rule)
    (task, delta), *_ = new.items()
    rebuilt = {t: cx.decouple(state, t, None) for t in state.tasks} | new
    expected = cx.unify(rebuilt, None, rule=rule)
    absorbed = cx.absorb(state, task, delta, None)
    for name in delta:
        terms = torch.stack([d[name].double() for d in rebuilt.values()])
        clear = terms.sum(0).abs() > 2.0**-22 * terms.abs().sum(0)
        for t in absorbed.tasks:
            assert torch.equal(absorbed.mask(t)[name][clear], expected.mask(t)[name][clear])
        difference = (absorbed.delta[name] - expected.delta[name]).abs()[clear]
        assert (difference <= 1e-6 * expected.delta[name].abs()[clear]).all()


@given(delta_sets(ordinary()), st.sampled_from(RULES))
def test_masks_agree_with_the_unified_delta(deltas: dict[str, Delta], rule: cx.FusionRule) -> None:
    """Where a bit is set, u has the sign of the task's delta; where none is, u is +0."""
    state = cx.unify(deltas, None, rule=rule)
    for name, u in state.delta.items():
        anyone = torch.zeros(u.shape, dtype=torch.bool)
        for task, delta in deltas.items():
            mask = state.mask(task)[name]
            assert (u[mask].sign() == delta[name][mask].sign()).all()
            assert (u[mask].abs() >= delta[name][mask].abs()).all()
            anyone |= mask
        dead = any(0 in lambdas(state, t) for t in state.tasks)
        if not dead:
            assert ((u != 0) == anyone).all()
        assert not (u[u == 0]).signbit().any()
