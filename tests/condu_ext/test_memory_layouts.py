"""Tied and overlapping tensors, memory orders, views: one element is read and counted once."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import numpy as np
import pytest
import torch
from kernel_cases import same_bytes
from torch import Tensor

import condu_ext as cx

Model = dict[str, Tensor]


def rand(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


# ---- ties ----------------------------------------------------------------------------------------


def tied_base() -> Model:
    """``b`` and ``d`` are one tensor, and so are ``a`` and ``e``."""
    shared, other = rand(4, 3), rand(5)
    return {"a": other, "b": shared, "c": rand(2), "d": shared, "e": other}


def untied(model: Model) -> Model:
    return {n: t.clone() for n, t in model.items()}


def moved(model: Model, seed: int = 7) -> Model:
    """A fine-tune with the same ties."""
    new: dict[int, Tensor] = {}
    return {
        n: new.setdefault(t.data_ptr(), t + 0.1 * rand(*t.shape, seed=seed + i))
        for i, (n, t) in enumerate(model.items())
    }


def test_tied_names_are_one_tensor() -> None:
    base = tied_base()
    state = cx.unify({"x": moved(base)}, base)
    assert set(state.delta) == set(base)
    assert state.delta["b"].data_ptr() == state.delta["d"].data_ptr()
    assert state.delta["a"].data_ptr() == state.delta["e"].data_ptr()
    theta = cx.decouple(state, "x", base)
    assert set(theta) == set(base)
    assert theta["b"].data_ptr() == theta["d"].data_ptr()
    single = {n: base[n] for n in "abc"}
    alone = cx.unify({"x": {n: moved(base)[n] for n in "abc"}}, single)
    assert alone.rescaler("x") == state.rescaler("x")
    assert state.nbytes == alone.nbytes


@pytest.mark.parametrize("names", ["abc", "ebc", "adc", "edc", "abcde"])
@pytest.mark.parametrize("copies", [False, True])
def test_any_alias_is_enough(names: str, copies: bool) -> None:
    """In a fine-tuned model, the base and the output alike; copies of equal value count as tied."""
    base, model = tied_base(), moved(tied_base())
    expected = cx.unify({"x": model}, base)
    part = {n: model[n] for n in names}
    found = cx.unify({"x": untied(part) if copies else part}, base)
    for name in base:
        assert same_bytes(found.delta[name], expected.delta[name])
    state = cx.absorb(cx.UnifiedDelta.empty(base), "x", part, {n: base[n] for n in names})
    assert same_bytes(state.delta["b"], expected.delta["b"])
    out = {n: torch.zeros_like(base[n]) for n in sorted(names)[:3]} if len(names) == 3 else None
    if out is not None:
        cx.decouple_(state, "x", base, out=out)
        theta = cx.decouple(state, "x", base)
        assert all(same_bytes(t, theta[n]) for n, t in out.items())


@pytest.mark.parametrize("who", ["model", "base of absorb", "base of decouple"])
def test_tied_names_that_differ(who: str) -> None:
    base, model = tied_base(), moved(tied_base())
    state = cx.unify({"x": model}, base)
    broken = untied(model if who == "model" else base)
    broken["d"][0, 0] += 1
    uses: dict[str, Callable[[], object]] = {
        "model": lambda: cx.unify({"x": broken}, base),
        "base of absorb": lambda: cx.absorb(state, "y", model, broken),
        "base of decouple": lambda: cx.decouple(state, "x", broken),
    }
    with pytest.raises(ValueError, match="'b' and 'd' are tied"):
        uses[who]()


def test_tied_names_of_different_shapes() -> None:
    base = tied_base()
    model = untied(moved(base))
    model["d"] = model["d"].reshape(3, 4)
    with pytest.raises(ValueError, match=r"\(3, 4\).*\(4, 3\)"):
        cx.unify({"x": model}, base)


def test_equal_tensors_are_not_tied() -> None:
    """Ties are ties of memory: two norms that both start at ones stay two tensors."""
    base = {"n1": torch.ones(4), "n2": torch.ones(4)}
    state = cx.unify({"x": {"n1": torch.ones(4) + 1, "n2": torch.ones(4) - 1}}, base)
    assert state.delta["n1"].tolist() == [1.0] * 4
    assert state.delta["n2"].tolist() == [-1.0] * 4


def test_tied_parameters_of_a_module() -> None:
    module = torch.nn.ModuleDict({"a": torch.nn.Linear(3, 4), "b": torch.nn.Linear(3, 4)})
    module["b"].weight = module["a"].weight
    base = {n: t.detach().clone() for n, t in module.named_parameters()}  # "b.weight" is not there
    with torch.no_grad():
        module["a"].weight.add_(1)
    state = cx.unify({"x": dict(module.named_parameters())}, base)
    assert state.delta["a.weight"].unique().numel() <= 3
    tied_base = {n: t.detach() for n, t in module.state_dict().items()}
    assert set(cx.UnifiedDelta.empty(tied_base).delta) == set(tied_base)


def overlapping() -> dict[str, Callable[[], tuple[Tensor, Tensor]]]:
    line, square = torch.randn(20), torch.randn(4, 4)
    return {
        "shifted": lambda: (line[:12], line[8:]),
        "inside": lambda: (line, line[4:8]),
        "same start": lambda: (line[:12], line[:8]),
        "reshaped": lambda: (square, square.view(2, 8)),
        "transposed": lambda: (square, square.t()),
        "columns of a dense one": lambda: (square, square[:, :2]),
        "overlapping columns": lambda: (square[:, :3], square[:, 1:]),
        "every second": lambda: (line, line[::2]),
    }


@pytest.mark.parametrize("kind", list(overlapping()))
@pytest.mark.parametrize("swap", [False, True])
def test_partial_overlap(kind: str, swap: bool) -> None:
    first, second = overlapping()[kind]()
    model = {"v": second, "w": first} if swap else {"w": first, "v": second}
    with pytest.raises(ValueError, match="share"):
        cx.UnifiedDelta.empty(model)
    with pytest.raises(ValueError, match=r"'[vw]' and '[vw]'"):
        cx.unify({"x": untied(model)}, model)


def disjoint() -> dict[str, Callable[[], tuple[Tensor, Tensor]]]:
    line, square = torch.randn(20), torch.randn(4, 4)
    return {
        "neighbours": lambda: (line[:8], line[8:]),
        "columns": lambda: (square[:, :2], square[:, 2:]),
        "even and odd": lambda: (line[::2], line[1::2]),
        "empty": lambda: (line, line[5:5]),
        "empty twice": lambda: (line[:0], line[:0]),
    }


@pytest.mark.parametrize("kind", list(disjoint()))
def test_parts_of_one_storage_without_overlap(kind: str) -> None:
    """Fused weights of a checkpoint are slices of one buffer: allowed, and each is its own."""
    first, second = disjoint()[kind]()
    base = {"w": first, "v": second, "more": torch.ones(1)}
    model = {"w": first + 1, "v": second - 2, "more": torch.ones(1)}
    state = cx.unify({"x": model}, base)
    assert torch.equal(state.delta["w"], model["w"] - first)
    assert torch.equal(state.delta["v"], model["v"] - second)


# ---- memory orders -------------------------------------------------------------------------------


def orders(shape: tuple[int, ...]) -> list[Callable[[Tensor], Tensor]]:
    """Copies of a tensor in every dense memory order, and some that are not dense."""

    def dense(order: tuple[int, ...]) -> Callable[[Tensor], Tensor]:
        back = [order.index(d) for d in range(len(order))]
        return lambda t: t.permute(order).contiguous().permute(back)

    def gaps(t: Tensor) -> Tensor:
        wide = torch.full((*t.shape[:-1], 2 * t.shape[-1]), torch.nan)
        wide[..., ::2] = t
        return wide[..., ::2]

    def slices(t: Tensor) -> Tensor:
        wide = torch.full((t.shape[0], t.shape[1] + 3, *t.shape[2:]), torch.nan)
        wide[:, 2 : t.shape[1] + 2] = t
        return wide[:, 2 : t.shape[1] + 2]

    return [*map(dense, itertools.permutations(range(len(shape)))), gaps, slices]


SHAPE = (3, 4, 2, 5)
PLAIN, CHANNELS_LAST, ROTATED, GAPS, SLICES = 0, 3, 9, 24, 25


def test_the_orders_are_what_they_are_called() -> None:
    made = [order(rand(*SHAPE)) for order in orders(SHAPE)]
    assert len(made) == 26
    assert made[PLAIN].is_contiguous()
    assert made[CHANNELS_LAST].is_contiguous(memory_format=torch.channels_last)
    assert len({t.stride() for t in made}) == 26


@pytest.mark.parametrize("base_order", range(26))
@pytest.mark.parametrize("model_order", [PLAIN, CHANNELS_LAST, ROTATED, GAPS, SLICES])
def test_memory_orders(base_order: int, model_order: int) -> None:
    """Values by index never depend on strides: neither of the base, the models, nor the output."""
    make = orders(SHAPE)
    base, a, b = rand(*SHAPE), rand(*SHAPE, seed=1), rand(*SHAPE, seed=2)
    plain = cx.absorb(cx.unify({"a": {"w": a}}, {"w": base}), "b", {"w": b}, {"w": base})
    start = {"w": make[base_order](base)}
    state = cx.unify({"a": {"w": make[model_order](a)}}, start)
    state = cx.absorb(state, "b", {"w": make[PLAIN](b)}, {"w": make[model_order](base)})
    assert state.delta["w"].shape == torch.Size(SHAPE)
    assert torch.equal(state.delta["w"], plain.delta["w"])
    for task in ("a", "b"):
        assert state.rescaler(task) == pytest.approx(plain.rescaler(task), rel=1e-7)
        mask = state.mask(task)["w"]
        assert torch.equal(mask, plain.mask(task)["w"])
        packed = np.packbits(mask.numpy().reshape(-1), bitorder="little")
        assert state.packed_mask(task)["w"].tolist() == packed.tolist()
        theta = cx.decouple(state, task, start)["w"]
        assert theta.shape == torch.Size(SHAPE)
        expected = cx.decouple(state, task, {"w": base})["w"]
        assert torch.equal(theta, expected)
        assert torch.allclose(theta, cx.decouple(plain, task, {"w": base})["w"])
        out = {"w": make[model_order](torch.zeros(SHAPE))}
        cx.decouple_(state, task, start, out=out)
        assert torch.equal(out["w"], expected)


def test_decouple_keeps_the_memory_order() -> None:
    base = {"w": rand(*SHAPE).to(memory_format=torch.channels_last)}
    state = cx.unify({"a": {"w": base["w"] + 1}}, base)
    theta = cx.decouple(state, "a", base)
    assert theta["w"].is_contiguous(memory_format=torch.channels_last)
    assert state.delta["w"].is_contiguous(memory_format=torch.channels_last)


def test_sizes_of_one_have_any_stride() -> None:
    base = rand(6, 1, 5).as_strided((6, 1, 5), (5, 1, 1))
    state = cx.unify({"a": {"w": base + 1}}, {"w": base})
    assert torch.equal(state.delta["w"], (base + 1) - base)


def test_gaps_are_not_written() -> None:
    base = {"w": rand(4, 3)}
    state = cx.unify({"a": {"w": base["w"] + 1}}, base)
    wide = torch.full((6, 7), 9.0)
    cx.decouple_(state, "a", base, out={"w": wide[1:5, 2:5]})
    assert torch.equal(wide[1:5, 2:5], cx.decouple(state, "a", base)["w"])
    wide[1:5, 2:5] = 9.0
    assert (wide == 9.0).all()


def test_expanded_inputs_are_read() -> None:
    model = {"w": torch.tensor([1.0, 2.0]).expand(3, 2)}
    state = cx.unify({"a": model}, None)
    assert torch.equal(state.delta["w"], model["w"])


def test_negated_views_are_read_by_value() -> None:
    """The imaginary part of a conjugate is a view with a negation bit, not a negated copy."""
    numbers = torch.complex(rand(5), rand(5, seed=1))
    view = torch.conj(numbers).imag
    assert view.is_neg()
    state = cx.unify({"a": {"w": view}}, None)
    assert torch.equal(state.delta["w"], -numbers.imag)


def test_a_tensor_without_dimensions() -> None:
    base = {"scale": torch.tensor(2.0), "w": torch.ones(3)}
    model = {"scale": torch.tensor(2.5), "w": torch.ones(3)}
    state = cx.unify({"a": model}, base)
    assert state.delta["scale"].shape == torch.Size(())
    assert float(state.delta["scale"]) == 0.5
    assert state.mask("a")["scale"].shape == torch.Size(())
    assert state.packed_mask("a")["scale"].tolist() == [1]
    assert float(cx.decouple(state, "a", base)["scale"]) == 2.5
    out = {"scale": torch.zeros(()), "w": torch.zeros(3)}
    cx.decouple_(state, "a", base, out=out)
    assert float(out["scale"]) == 2.5


def test_tensors_without_elements() -> None:
    base = {"none": torch.ones(3, 0), "w": torch.ones(3), "zero": torch.ones(0)}
    state = cx.unify({"a": {n: t + 1 for n, t in base.items()}}, base)
    state = cx.absorb(state, "b", {n: t + 2 for n, t in base.items()}, base)
    assert state.delta["none"].shape == (3, 0)
    assert state.mask("b")["none"].shape == (3, 0)
    assert state.packed_mask("b")["none"].numel() == 0
    assert cx.decouple(state, "b", base)["none"].shape == (3, 0)
    alone = cx.unify({"a": {"w": base["w"] + 1}}, {"w": base["w"]})
    alone = cx.absorb(alone, "b", {"w": base["w"] + 2}, {"w": base["w"]})
    assert state.rescaler("b") == alone.rescaler("b")


@pytest.mark.parametrize("rescale", ["global", "tensor_mean", "per_tensor"])
def test_a_model_without_elements(rescale: str) -> None:
    base = {"none": torch.ones(3, 0)}
    rule = cx.FusionRule(rescale=rescale)
    state = cx.absorb(cx.unify({"a": base}, base, rule=rule), "b", base, base)
    assert state.rescaler("a") in (0.0, {"none": 0.0})
    assert cx.decouple(state, "b", base)["none"].shape == (3, 0)


def test_a_negated_view_of_the_same_memory_is_no_alias() -> None:
    """It has other values, so it shares memory without being tied: refused, never counted once."""
    complex_numbers = torch.complex(rand(*SHAPE), rand(*SHAPE))
    plain, negated = complex_numbers.imag, complex_numbers.conj().imag
    assert negated.is_neg()
    assert plain.data_ptr() == negated.data_ptr()
    with pytest.raises(ValueError, match="'a' and 'b' share a part of their memory"):
        cx.unify({"t": {"a": plain, "b": negated}}, None)
