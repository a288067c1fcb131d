"""FusionRule: ties, the three rescalers recomputed by hand, and what the degenerate cases mean."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import condu_ext as cx

Delta = dict[str, Tensor]


def vector(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float32)


def random_deltas(tasks: int) -> dict[str, Delta]:
    """Four tensors of very different sizes, one of them empty."""
    generator = torch.Generator().manual_seed(0)
    sizes = {"big": (40, 50), "small": (7,), "scalar": (), "none": (0, 3)}
    return {
        f"t{k}": {n: (k + 1) * torch.randn(s, generator=generator) for n, s in sizes.items()}
        for k in range(tasks)
    }


def sums(state: cx.UnifiedDelta, task: str, delta: Delta) -> dict[str, tuple[float, float]]:
    """Σ|d| and Σ M·|u| of each tensor, in float64."""
    mask = state.mask(task)
    return {
        name: (
            float(d.double().abs().sum()),
            float((state.delta[name].double().abs() * mask[name]).sum()),
        )
        for name, d in delta.items()
    }


def test_defaults() -> None:
    assert cx.FusionRule() == cx.FusionRule(zero_sum="negative", rescale="global")
    assert cx.unify({"a": {"w": vector(1)}}, None).rule == cx.FusionRule()


def test_is_frozen() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        cx.FusionRule().zero_sum = "zero"  # type: ignore[misc]


@pytest.mark.parametrize(
    ("arguments", "field", "value"),
    [
        ({"zero_sum": "none"}, "zero_sum", "none"),
        ({"zero_sum": 0}, "zero_sum", "0"),
        ({"rescale": "mean"}, "rescale", "mean"),
    ],
)
def test_unknown_values(arguments: dict[str, Any], field: str, value: str) -> None:
    with pytest.raises(ValueError, match=rf"FusionRule\.{field} .*{value}"):
        cx.FusionRule(**arguments)


# Columns: two agree, they disagree, a tie, a tie of zeros, only one moved.
A = vector(1, -4, 2, 0.0, 0)
B = vector(3, 1, -2, -0.0, -5)


@pytest.mark.parametrize(
    ("zero_sum", "u", "mask_a", "mask_b"),
    [
        ("negative", [3, -4, -2, 0, -5], [1, 1, 0, 0, 0], [1, 0, 1, 0, 1]),
        ("positive", [3, -4, 2, 0, -5], [1, 1, 1, 0, 0], [1, 0, 0, 0, 1]),
        ("zero", [3, -4, 0, 0, -5], [1, 1, 0, 0, 0], [1, 0, 0, 0, 1]),
    ],
)
@pytest.mark.parametrize("how", ["unify", "absorb", "absorb_", "merge"])
def test_ties(
    how: str, zero_sum: str, u: list[float], mask_a: list[int], mask_b: list[int]
) -> None:
    rule = cx.FusionRule(zero_sum=zero_sum)
    a, b = {"w": A}, {"w": B}
    state = cx.unify({"a": a}, None, rule=rule)
    if how == "unify":
        state = cx.unify({"a": a, "b": b}, None, rule=rule)
    elif how == "absorb":
        state = cx.absorb(state, "b", b, None)
    elif how == "absorb_":
        cx.absorb_(state, "b", b, None)
    else:
        state = cx.merge(state, cx.unify({"b": b}, None, rule=rule))
    assert state.delta["w"].tolist() == u
    assert not state.delta["w"][3].signbit()
    assert state.mask("a")["w"].int().tolist() == mask_a
    assert state.mask("b")["w"].int().tolist() == mask_b


# ---- rescalers -----------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["unify", "absorb", "absorb_", "merge"])
@pytest.mark.parametrize("rescale", ["global", "tensor_mean", "per_tensor"])
def test_rescalers(rescale: str, how: str) -> None:
    deltas = random_deltas(3)
    rule = cx.FusionRule(rescale=rescale)
    old = {t: d for t, d in deltas.items() if t != "t2"}
    norms = deltas
    if how == "unify":
        state = cx.unify(deltas, None, rule=rule)
    elif how == "merge":
        last = cx.unify({"t2": deltas["t2"]}, None, rule=rule)
        state = cx.merge(cx.unify(old, None, rule=rule), last)
    else:
        state = cx.unify(old, None, rule=rule)
        if how == "absorb":
            state = cx.absorb(state, "t2", deltas["t2"], None)
        else:
            cx.absorb_(state, "t2", deltas["t2"], None)
    for task, delta in norms.items():
        by_tensor = sums(state, task, delta)
        found = state.rescaler(task)
        if rescale == "per_tensor":
            assert isinstance(found, dict)
            assert list(found) == list(delta)
            for name, (num, den) in by_tensor.items():
                assert found[name] == pytest.approx(num / den if den else 0.0, rel=2e-7)
            continue
        weight = {n: 1 / d.numel() if d.numel() else 0.0 for n, d in delta.items()}
        if rescale == "global":
            weight = dict.fromkeys(delta, 1.0)
        num = sum(weight[n] * s[0] for n, s in by_tensor.items())
        den = sum(weight[n] * s[1] for n, s in by_tensor.items())
        assert isinstance(found, float)
        assert found == pytest.approx(num / den, rel=2e-7)


def test_the_kinds_of_rescalers_differ() -> None:
    """Or the test above could not tell them apart."""
    deltas = random_deltas(3)
    found = [
        cx.unify(deltas, None, rule=cx.FusionRule(rescale=r)).rescaler("t1")
        for r in ("global", "tensor_mean")
    ]
    assert found[0] != pytest.approx(found[1], rel=1e-3)


def test_rescaled_norm_with_per_tensor() -> None:
    """Every tensor keeps its own norm."""
    deltas = random_deltas(4)
    state = cx.unify(deltas, None, rule=cx.FusionRule(rescale="per_tensor"))
    for task, delta in deltas.items():
        for name, d in cx.decouple(state, task, None).items():
            if state.mask(task)[name].any():
                expected = float(delta[name].double().abs().sum())
                assert float(d.double().abs().sum()) == pytest.approx(expected, rel=1e-6)


def test_tied_tensors_count_once() -> None:
    big, small = torch.full((100,), 2.0), torch.full((10,), 1.0)
    tied = {"a": {"x": big, "y": small, "z": big}, "b": {"x": -big / 4, "y": small * 3, "z": None}}
    tied["b"]["z"] = tied["b"]["x"]
    single = {t: {n: d[n] for n in ("x", "y")} for t, d in tied.items()}
    for rescale in ("global", "tensor_mean", "per_tensor"):
        rule = cx.FusionRule(rescale=rescale)
        a, b = (cx.unify(deltas, None, rule=rule) for deltas in (tied, single))
        for task in ("a", "b"):
            found, expected = a.rescaler(task), b.rescaler(task)
            if isinstance(found, dict) and isinstance(expected, dict):
                assert found.pop("z") == found["x"]
            assert found == expected


def test_a_bfloat16_state_rescales_what_it_stores() -> None:
    """u is rounded when stored, and the rescaler makes up for it."""
    generator = torch.Generator().manual_seed(0)
    deltas = {f"t{k}": {"w": torch.randn(5000, generator=generator)} for k in range(3)}
    state = cx.unify(deltas, None, dtype=torch.bfloat16)
    assert state.dtype == torch.bfloat16
    assert state.delta["w"].dtype == torch.bfloat16
    for task, delta in deltas.items():
        num, den = sums(state, task, delta)["w"]
        assert state.rescaler(task) == pytest.approx(num / den, rel=2e-7)
        rebuilt = cx.decouple(state, task, None)["w"].double().abs().sum()
        assert float(rebuilt) == pytest.approx(num, rel=1e-6)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64, torch.int32])
def test_state_dtypes_that_are_refused(dtype: torch.dtype) -> None:
    with pytest.raises(ValueError, match=str(dtype)):
        cx.unify({"a": {"w": vector(1)}}, None, dtype=dtype)
    with pytest.raises(ValueError, match=str(dtype)):
        cx.UnifiedDelta.empty({"w": vector(1)}, dtype=dtype)


# ---- degenerate cases ----------------------------------------------------------------------------


def warned(action: Callable[[], Any]) -> tuple[Any, list[str]]:
    """An action's result and its warnings, which must all be UserWarning."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        result = action()
    assert all(w.category is UserWarning for w in caught)
    return result, [str(w.message) for w in caught]


def one(value: float, numel: int = 40) -> Delta:
    return {"w": torch.full((numel,), value)}


@pytest.mark.parametrize("rescale", ["global", "tensor_mean", "per_tensor"])
def test_a_task_that_did_not_move(rescale: str) -> None:
    base = {"w": torch.randn(40)}
    rule = cx.FusionRule(rescale=rescale)
    models = {"still": {"w": base["w"].clone()}, "b": {"w": base["w"] + 1}}
    state, messages = warned(lambda: cx.unify(models, base, rule=rule))
    assert not messages
    assert state.rescaler("still") in (0.0, {"w": 0.0})
    assert not state.mask("still")["w"].any()
    assert torch.equal(cx.decouple(state, "still", base)["w"], base["w"])
    state, messages = warned(lambda: cx.absorb(state, "again", base, base))
    assert not messages
    assert state.rescaler("again") in (0.0, {"w": 0.0})
    assert state.rescaler("b") in (1.0, {"w": 1.0})


def test_all_tasks_did_not_move() -> None:
    state, messages = warned(lambda: cx.unify({"a": one(0.0), "b": one(-0.0)}, None))
    assert not messages
    assert state.rescaler("a") == state.rescaler("b") == 0.0
    assert not state.delta["w"].any()
    assert not state.delta["w"].signbit().any()


def outvote(how: str, rule: cx.FusionRule) -> cx.UnifiedDelta:
    """A state where "weak" has lost every element to "strong"."""
    weak, strong = one(1.0), one(-3.0)
    if how == "unify":
        return cx.unify({"weak": weak, "strong": strong}, None, rule=rule)
    state = cx.unify({"weak": weak}, None, rule=rule)
    if how == "absorb":
        return cx.absorb(state, "strong", strong, None)
    if how == "absorb_":
        cx.absorb_(state, "strong", strong, None)
        return state
    return cx.merge(state, cx.unify({"strong": strong}, None, rule=rule))


@pytest.mark.parametrize("rescale", ["global", "tensor_mean", "per_tensor"])
@pytest.mark.parametrize("how", ["unify", "absorb", "absorb_", "merge"])
def test_a_task_that_is_outvoted_everywhere(how: str, rescale: str) -> None:
    rule = cx.FusionRule(rescale=rescale)
    state, messages = warned(lambda: outvote(how, rule))
    assert len(messages) == 1
    assert "'weak'" in messages[0]
    assert "strong" not in messages[0]
    assert set(cx.decouple(state, "weak", None)["w"].tolist()) == {0.0}
    assert state.rescaler("weak") in (0.0, {"w": 0.0})
    assert not state.mask("weak")["w"].any()
    # It stays dead, without another word, even where later tasks agree with it.
    for number in range(3):
        state, messages = warned(lambda: cx.absorb(state, f"n{number}", one(9.0), None))  # noqa: B023
        assert not any("'weak'" in m for m in messages)
        assert state.rescaler("weak") in (0.0, {"w": 0.0})
        assert not state.mask("weak")["w"].any()


@pytest.mark.parametrize("how", ["unify", "absorb", "absorb_", "merge"])
def test_the_warning_points_at_the_caller(how: str) -> None:
    with pytest.warns(UserWarning, match="'weak'") as caught:
        outvote(how, cx.FusionRule())
    assert [w.filename for w in caught] == [__file__]


def test_warnings_that_are_errors() -> None:
    """``python -W error``: absorb_ raises, but the state is whole, and all of it was updated."""
    state = cx.unify({"weak": one(1.0)}, None)
    expected, _ = warned(lambda: cx.absorb(state, "strong", one(-3.0), None))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(UserWarning, match="'weak'"):
            cx.absorb_(state, "strong", one(-3.0), None)
    assert state.tasks == expected.tasks
    for task in expected.tasks:
        assert state.rescaler(task) == expected.rescaler(task)
        assert torch.equal(state.mask(task)["w"], expected.mask(task)["w"])


def test_outvoted_on_all_but_one_element_is_not_dead() -> None:
    weak, strong = one(1.0), one(-3.0)
    strong["w"][17] = 0.0
    state, messages = warned(lambda: cx.unify({"weak": weak, "strong": strong}, None))
    assert not messages
    assert state.rescaler("weak") == 40.0
    assert state.mask("weak")["w"].nonzero().view(-1).tolist() == [17]


def test_per_tensor_death_of_one_tensor() -> None:
    """One tensor of a task is outvoted: no warning, its other tensors live on."""
    rule = cx.FusionRule(rescale="per_tensor")
    models = {
        "a": {"x": vector(1, 1), "y": vector(2, 2)},
        "b": {"x": vector(-3, -3), "y": vector(1, 1)},
    }
    state, messages = warned(lambda: cx.unify(models, None, rule=rule))
    assert not messages
    assert state.rescaler("a") == {"x": 0.0, "y": 1.0}
    assert not state.mask("a")["x"].any()
    state, messages = warned(
        lambda: cx.absorb(state, "c", {"x": vector(9, 9), "y": vector(-9, -9)}, None)
    )
    # Now its last tensor is outvoted as well, and so is b's: both are named, once each.
    assert sorted(m.split("'")[1] for m in messages) == ["a", "b"]
    assert state.rescaler("a") == {"x": 0.0, "y": 0.0}


def test_an_outvoted_tensor_keeps_its_norm_in_the_global_rescaler() -> None:
    """λ is over all elements: what x lost, y makes up for."""
    models = {
        "a": {"x": vector(1, 1), "y": vector(2, 2)},
        "b": {"x": vector(-3, -3), "y": vector(1, 1)},
    }
    state, messages = warned(lambda: cx.unify(models, None))
    assert not messages
    assert state.rescaler("a") == 1.5


def test_underflow_in_a_bfloat16_state() -> None:
    """A delta too small for the stored type: a rescaler of 0, and never NaN."""
    tiny = torch.full((20,), 2.0**-149)
    state, _ = warned(lambda: cx.unify({"a": {"w": tiny}}, None, dtype=torch.bfloat16))
    assert state.rescaler("a") == 0.0
    assert not state.mask("a")["w"].any()
    assert not cx.decouple(state, "a", None)["w"].any()


def test_a_rescaler_too_small_for_its_type() -> None:
    """1e-40 against 1e30 rounds to λ = 0: no bit may stay that a later task could bring to life."""
    tiny, large = {"w": torch.full((20,), 1e-40)}, {"w": torch.full((20,), 1e30)}
    state, _ = warned(lambda: cx.unify({"tiny": tiny, "large": large}, None))
    for name in ("b", "c"):
        assert state.rescaler("tiny") == 0.0
        assert not state.mask("tiny")["w"].any()
        state, _ = warned(lambda: cx.absorb(state, name, {"w": torch.ones(20)}, None))  # noqa: B023


def test_rescalers_beyond_the_range_stay_finite() -> None:
    """Σ|d| / Σ M·|u| of 1e30 over 1e-40 exceeds fp32."""
    models = {"a": {"w": vector(1e30, 1e-40)}, "b": {"w": vector(-2e30, 0)}}
    state = cx.unify(models, None)
    largest = torch.finfo(torch.float32).max
    assert state.rescaler("a") == largest
    state = cx.absorb(state, "c", {"w": vector(1e30, 1e-40)}, None)
    assert all(0 <= float(state.rescaler(t)) <= largest for t in state.tasks)
    assert all(cx.decouple(state, t, None)["w"].isfinite().all() for t in state.tasks)
