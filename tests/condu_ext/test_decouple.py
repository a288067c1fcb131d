"""decouple and decouple_: experts written into live weights, and what autograd knows of it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from kernel_cases import same_bytes
from torch import Tensor, nn

import condu_ext as cx

Model = dict[str, Tensor]


def base_model(dtype: torch.dtype = torch.float32) -> Model:
    generator = torch.Generator().manual_seed(0)
    return {
        "w": torch.randn(20, 30, generator=generator).to(dtype),
        "b": torch.randn(30, generator=generator).to(dtype),
    }


def tuned(seed: int, dtype: torch.dtype = torch.float32) -> Model:
    generator = torch.Generator().manual_seed(seed)
    return {
        n: (t.float() + 0.1 * torch.randn(t.shape, generator=generator)).to(dtype)
        for n, t in base_model(dtype).items()
    }


def two_tasks(dtype: torch.dtype = torch.float32) -> cx.UnifiedDelta:
    return cx.unify({"a": tuned(1, dtype), "b": tuned(2, dtype)}, base_model(dtype))


def copy_of(model: Model) -> Model:
    return {n: t.detach().clone() for n, t in model.items()}


def assert_same(found: Model, expected: Model) -> None:
    assert set(found) == set(expected)
    for name, tensor in expected.items():
        assert same_bytes(found[name], tensor), name


# ---- values --------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_formula(dtype: torch.dtype) -> None:
    """Multiply, then add, in fp32, then one rounding; θ_0's own bits where the mask is 0."""
    base, state = base_model(dtype), two_tasks(dtype)
    base["w"][0, :4] = torch.tensor([-0.0, 0.0, -0.0, 0.0])
    for task in state.tasks:
        theta = cx.decouple(state, task, base)
        delta = cx.decouple(state, task, None)
        rescaler = torch.tensor(state.rescaler(task))
        for name, u in state.delta.items():
            mask = state.mask(task)[name]
            assert 0 < int(mask.sum()) < mask.numel()
            moved = torch.where(mask, rescaler * u, 0.0)
            assert same_bytes(delta[name], moved)
            expected = torch.where(mask, (base[name].float() + moved).to(dtype), base[name])
            assert same_bytes(theta[name], expected)


def test_negative_zeros_of_the_base_survive() -> None:
    base = {"w": torch.tensor([-0.0, -0.0, 0.0])}
    state = cx.unify({"a": {"w": torch.tensor([0.0, 1.0, -0.0])}}, base)
    theta = cx.decouple(state, "a", base)["w"]
    assert theta.tolist() == [0.0, 1.0, 0.0]
    assert theta.signbit().tolist() == [True, False, False]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("out_dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_outputs_of_another_dtype(dtype: torch.dtype, out_dtype: torch.dtype) -> None:
    """Computed in fp32 from θ_0 and rounded once, to the output's dtype."""
    base, state = base_model(dtype), two_tasks(dtype)
    wide = {n: t.float() for n, t in base.items()}
    out = {n: torch.full(t.shape, torch.nan, dtype=out_dtype) for n, t in base.items()}
    cx.decouple_(state, "a", base, out=out)
    expected = cx.decouple(state, "a", wide)
    assert_same(out, {n: t.to(out_dtype) for n, t in expected.items()})


def test_writes_all_and_only_the_outputs() -> None:
    base, state = base_model(), two_tasks()
    buffer = torch.full((1000,), 5.0)
    out = {"w": buffer[101:701].view(20, 30), "b": buffer[901:931]}
    cx.decouple_(state, "b", base, out=out)
    assert_same(out, cx.decouple(state, "b", base))
    out["w"].fill_(5.0)
    out["b"].fill_(5.0)
    assert (buffer == 5.0).all()


def test_one_expert_after_another() -> None:
    """Each starts from θ_0, not from what the output holds."""
    base, state, live = base_model(), two_tasks(), tuned(5)
    for task in ("a", "b", "a"):
        cx.decouple_(state, task, base, out=live)
        assert_same(live, cx.decouple(state, task, base))


def test_deltas() -> None:
    state = two_tasks()
    out = {n: torch.full_like(t, torch.nan) for n, t in base_model().items()}
    cx.decouple_(state, "a", None, out=out)
    assert_same(out, cx.decouple(state, "a", None))
    assert all(t.dtype == torch.float32 for t in out.values())


def test_a_state_of_deltas_over_a_base() -> None:
    """Deltas are deltas: who made them does not matter."""
    base = base_model()
    deltas = {t: {n: m[n] - base[n] for n in base} for t, m in (("a", tuned(1)), ("b", tuned(2)))}
    state = cx.unify(deltas, None)
    for task in ("a", "b"):
        assert_same(cx.decouple(state, task, base), cx.decouple(two_tasks(), task, base))


# ---- refused outputs -----------------------------------------------------------------------------


def refuse(out: Model, error: type[Exception], words: str, base: Model | None = None) -> None:
    """decouple_ raises, and neither the output nor the base has changed."""
    base = base_model() if base is None else base
    before, start = copy_of(out), copy_of(base)
    with pytest.raises(error, match=words):
        cx.decouple_(two_tasks(), "a", base, out=out)
    assert_same(copy_of(out), before)
    assert_same(base, start)


def test_missing_and_extra_outputs() -> None:
    out = tuned(3)
    refuse({"w": out["w"]}, KeyError, "out.*'b'.*missing")
    refuse(out | {"x": torch.ones(2)}, ValueError, "out.*'x'")
    refuse(out | {"b": torch.ones(31)}, ValueError, r"out.*'b'.*\(31,\).*\(30,\)")
    refuse(out | {"b": torch.ones(30, dtype=torch.float64)}, TypeError, "out.*'b'.*float64")
    with pytest.raises(TypeError, match=r"out.*'b'.*meta"):
        cx.decouple_(two_tasks(), "a", base_model(), out=out | {"b": torch.ones(30, device="meta")})


def test_expanded_outputs() -> None:
    refuse(tuned(3) | {"w": torch.ones(30).expand(20, 30)}, ValueError, "'w'.*expanded")
    refuse(tuned(3) | {"w": torch.ones(20, 1).expand(20, 30)}, ValueError, "'w'.*expanded")


def test_outputs_that_overlap_each_other() -> None:
    buffer = torch.zeros(620)
    out = {"w": buffer[:600].view(20, 30), "b": buffer[590:]}
    refuse(out, ValueError, "out.*'[wb]'.*share")


def shared_with_base() -> dict[str, Callable[[Model], Model]]:
    return {
        "the same": lambda base: base,
        "one of them": lambda base: tuned(3) | {"b": base["b"]},
        "a view": lambda base: tuned(3) | {"w": base["w"].view(600).view(20, 30)},
        "another name": lambda base: tuned(3) | {"b": base["w"][0]},
        "a part": lambda base: tuned(3) | {"b": base["w"].view(-1)[100:130]},
        "around it": lambda base: tuned(3) | {"b": base["w"].view(-1)[::20]},
    }


@pytest.mark.parametrize("kind", list(shared_with_base()))
def test_outputs_that_are_the_base(kind: str) -> None:
    """θ_0 must survive, and must not be written while it is read."""
    base = base_model()
    refuse(shared_with_base()[kind](base), ValueError, "pretrained", base)


def test_outputs_that_are_the_state() -> None:
    """``state.delta`` is a view of the unified delta itself."""
    state = two_tasks()
    before = copy_of(state.delta)
    with pytest.raises(ValueError, match="state"):
        cx.decouple_(state, "a", base_model(), out=state.delta)
    assert_same(state.delta, before)


@pytest.mark.parametrize("with_base", [True, False])
def test_tied_in_the_state_but_not_in_the_output(with_base: bool) -> None:
    """Both names would have to be written; equal values must not hide that."""
    shared = torch.randn(6)
    base = {"x": shared, "y": shared}
    state = cx.unify({"a": {"x": shared + 1}}, base)
    out = {"x": torch.zeros(6), "y": torch.zeros(6)}
    with pytest.raises(ValueError, match=r"'x'.*tied"):
        cx.decouple_(state, "a", base if with_base else None, out=out)
    out["y"] = out["x"]
    cx.decouple_(state, "a", base if with_base else None, out=out)
    assert torch.equal(out["y"], cx.decouple(state, "a", base if with_base else None)["y"])


# ---- autograd ------------------------------------------------------------------------------------


def test_leaves_that_require_grad() -> None:
    module = nn.Linear(20, 30)
    base = {n: t.detach().clone() for n, t in module.named_parameters()}
    state = cx.unify({"a": {n: t + 1 for n, t in base.items()}}, base)
    live = dict(module.named_parameters())
    with pytest.raises(RuntimeError, match=r"'weight'.*requires grad.*no_grad"):
        cx.decouple_(state, "a", base, out=live)
    assert_same(copy_of(live), base)
    with torch.no_grad():
        cx.decouple_(state, "a", base, out=live)
    assert_same(copy_of(live), cx.decouple(state, "a", base))
    assert all(p.requires_grad and p.is_leaf and p.grad is None for p in live.values())
    # Detached, it is no leaf that requires grad.
    cx.decouple_(state, "a", base, out={n: t.detach() for n, t in live.items()})
    frozen = {n: t.requires_grad_(False) for n, t in live.items()}
    cx.decouple_(state, "a", base, out=frozen)


def test_views_of_leaves_that_require_grad() -> None:
    """What PyTorch itself refuses to change in place."""
    weight = nn.Parameter(torch.zeros(40, 30))
    base, state = base_model(), two_tasks()
    with pytest.raises(RuntimeError, match=r"'w'.*no_grad"):
        cx.decouple_(state, "a", base, out=tuned(3) | {"w": weight[:20]})
    assert not weight.any()
    with torch.no_grad():
        cx.decouple_(state, "a", base, out=tuned(3) | {"w": weight[:20]})
    assert same_bytes(weight[:20], cx.decouple(state, "a", base)["w"])


@pytest.mark.parametrize("layout", ["contiguous", "copied"])
@pytest.mark.parametrize("private", [(), ("b",)])
def test_saved_tensors_that_are_overwritten(layout: str, private: tuple[str, ...]) -> None:
    """A weight saved for backward and then replaced by an expert: an error, no wrong gradient."""
    base = base_model()
    state = cx.unify({"a": tuned(1)}, base, private=private)
    for name in ("w", "b"):
        live = tuned(5)
        if layout == "copied":
            live = {n: torch.stack([t, t], -1)[..., 0] for n, t in live.items()}
        x = torch.ones_like(live[name], requires_grad=True)
        loss = (x * live[name]).sum()
        versions = {n: t._version for n, t in live.items()}
        cx.decouple_(state, "a", base, out=live)
        assert all(t._version > versions[n] for n, t in live.items())
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            loss.backward()


def test_versions_of_what_is_only_read() -> None:
    base, state = base_model(), two_tasks()
    x = torch.ones(20, 30, requires_grad=True)
    loss = (x * base["w"]).sum()
    cx.decouple_(state, "a", base, out=tuned(5))
    loss.backward()
    assert x.grad is not None


def test_the_state_saved_for_backward_and_then_absorbed_into() -> None:
    """``state.delta`` is a view, so that in-place fusion must be seen by autograd too."""
    state = two_tasks()
    x = torch.ones(20, 30, requires_grad=True)
    loss = (x * state.delta["w"]).sum()
    cx.absorb_(state, "c", tuned(3), base_model())
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_nothing_carries_a_gradient() -> None:
    module = nn.Linear(20, 30)
    live = dict(module.named_parameters())
    base = copy_of(live)
    with torch.no_grad():
        module.weight.add_(1)
    state = cx.absorb(cx.unify({"a": live}, live), "b", live, base)
    cx.absorb_(state, "c", live, base)
    results = [*state.delta.values(), *cx.decouple(state, "b", live).values()]
    assert not any(t.requires_grad for t in results)


def test_parameters_as_base() -> None:
    """θ_0 itself may be a module's parameters."""
    module = nn.Linear(20, 30)
    live = dict(module.named_parameters())
    state = cx.unify({"a": {n: t.detach() + 1 for n, t in live.items()}}, live)
    assert_same(cx.decouple(state, "a", live), cx.decouple(state, "a", copy_of(live)))


# ---- inference mode ------------------------------------------------------------------------------


def outvote(state: cx.UnifiedDelta) -> None:
    with pytest.warns(UserWarning, match="'a'"):
        cx.absorb_(state, "b", {"w": torch.full((9,), -3.0)}, None)


MADE: dict[str, Callable[[], Any]] = {
    "unify": lambda: cx.unify({"a": {"w": torch.ones(9)}}, None),
    "absorb": lambda: cx.absorb(
        cx.UnifiedDelta.empty({"w": torch.ones(9)}), "a", {"w": torch.ones(9)}, None
    ),
    "merge": lambda: cx.merge(
        cx.unify({"a": {"w": torch.ones(9)}}, None), cx.UnifiedDelta.empty({"w": torch.ones(9)})
    ),
    "to": lambda: cx.unify({"a": {"w": torch.ones(9)}}, None).to("cpu"),
}


@pytest.mark.parametrize("how", list(MADE))
def test_states_made_under_inference_mode(how: str) -> None:
    """They outlive it: an ordinary state, to be changed and read outside."""
    with torch.inference_mode():
        state = MADE[how]()
    outvote(state)
    assert state.tasks == ("a", "b")
    assert state.rescaler("a") == 0.0
    x = torch.ones(9, requires_grad=True)
    (x * state.delta["w"]).sum().backward()


def test_live_weights_under_inference_mode() -> None:
    base, state = base_model(), two_tasks()
    module = nn.Linear(30, 20)
    live = {"w": module.weight, "b": torch.zeros(30)}
    with torch.inference_mode():
        cx.decouple_(state, "a", base, out=live)
        inside = {n: torch.zeros_like(t) for n, t in base.items()}
        cx.decouple_(state, "a", base, out=inside)
    for found in (live, inside):
        assert_same(copy_of(found), cx.decouple(state, "a", base))
