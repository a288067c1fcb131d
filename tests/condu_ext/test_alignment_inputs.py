"""Adapters given to aligned merging: what is refused, layouts, ties, and what autograd knows."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from adapters import Adapter, adapter, copy_of
from kernel_cases import BF16, same_bytes
from torch import Tensor, nn

import condu_ext as cx

Call = Callable[[Adapter, Adapter], Any]


def align(w: Adapter, g: Adapter) -> Tensor:
    thresholds = {name: torch.tensor(0.1) for name, t in w.items() if t.is_floating_point()}
    return cx.align_(w, g, thresholds, "global")


def average(g: Adapter, w: Adapter) -> None:
    cx.average_(g, w, 0.25)


# Each writes its first argument: its name, and the other's.
WRITERS: list[Any] = [
    pytest.param(align, "current", "reference", id="align_"),
    pytest.param(average, "reference", "current", id="average_"),
]


def pair() -> tuple[Adapter, Adapter]:
    return adapter([600, 7], "fp32", 1), adapter([600, 7], "fp32", 2)


def refuse(call: Call, written: Adapter, read: Adapter, error: type[Exception], words: str) -> None:
    """The call raises, and neither side has changed."""
    before, kept = copy_of(written), copy_of(read)
    with pytest.raises(error, match=words):
        call(written, read)
    assert all(same_bytes(written[n], t) for n, t in before.items())
    assert all(same_bytes(read[n], t) for n, t in kept.items())


# ---- refused -------------------------------------------------------------------------------------


@pytest.mark.parametrize(("call", "who", "other"), WRITERS)
def test_names_and_shapes(call: Call, who: str, other: str) -> None:
    out, read = pair()
    refuse(call, out, {"t0": read["t0"]}, KeyError, f"{other}: tensor 't1' is missing")
    refuse(call, out, read | {"x": torch.ones(2)}, ValueError, f"{other}.*'x'.* not in {who}")
    refuse(call, out | {"x": torch.ones(2)}, read, KeyError, f"{other}: tensor 'x' is missing")
    longer = read | {"t1": torch.ones(8)}
    refuse(call, out, longer, ValueError, rf"{other}.*'t1'.*\(8,\).*\(7,\)")
    refuse(call, out, read | {"t1": torch.ones(7, 1)}, ValueError, rf"{other}.*'t1'.*\(7, 1\)")
    refuse(call, {}, {}, ValueError, f"{who}: there is no")


@pytest.mark.parametrize(("call", "who", "other"), WRITERS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float8_e4m3fn, torch.complex64])
def test_dtypes(call: Call, who: str, other: str, dtype: torch.dtype) -> None:
    out, read = pair()
    strange = torch.zeros(7, dtype=dtype)
    with pytest.raises(TypeError, match=f"{who}.*'t1'.*{dtype}"):
        call(out | {"t1": strange}, read)
    with pytest.raises(TypeError, match=f"{other}.*'t1'.*{dtype}"):
        call(out, read | {"t1": strange})


@pytest.mark.parametrize(("call", "who", "other"), WRITERS)
def test_no_tensor_in_memory(call: Call, who: str, other: str) -> None:
    out, read = pair()
    meta = torch.zeros(7, device="meta")
    with pytest.raises(TypeError, match=f"{who}.*'t1'.*meta"):
        call(out | {"t1": meta}, read)
    with pytest.raises(TypeError, match=f"{other}.*'t1'.*meta"):
        call(out, read | {"t1": meta})
    with pytest.raises(TypeError, match=f"{other}.*'t1'.*float"):
        call(out, read | {"t1": 1.0})  # type: ignore[dict-item]


@pytest.mark.parametrize(("call", "who", "other"), WRITERS)
def test_memory_that_is_shared(call: Call, who: str, other: str) -> None:
    out, read = pair()
    refuse(call, out, read | {"t1": out["t1"]}, ValueError, f"{who}.*'t1'.* shares .*{other}")
    refuse(call, out, read | {"t1": out["t0"][3:10]}, ValueError, f"{who}.*'t0'.* shares .*{other}")
    overlapping = out | {"t1": out["t0"][3:10]}
    refuse(call, overlapping, read, ValueError, f"{who}.*'t0' and 't1' share")
    expanded = out | {"t1": torch.ones(1).expand(7)}
    refuse(call, expanded, read, ValueError, f"{who}.*'t1'.*expanded")


@pytest.mark.parametrize(("call", "who", "other"), WRITERS)
def test_negated_views(call: Call, who: str, other: str) -> None:
    """The imaginary part of a conjugate is one; read, it counts with its own sign."""
    out, read = pair()
    negated = torch.complex(torch.zeros(7), -read["t1"]).conj().imag
    assert negated.is_neg()
    refuse(call, out | {"t1": negated}, read, ValueError, f"{who}.*'t1'.*negated view")
    expected = expected_of(call, out, read)
    call(out, read | {"t1": negated})
    assert all(same_bytes(out[name], t) for name, t in expected.items())


@pytest.mark.parametrize("wrong", [[torch.ones(7)], nn.Linear(2, 3), None, 0.5])
def test_adapters_that_are_no_mappings(wrong: Any) -> None:
    g, w = pair()
    limits = cx.magnitude_threshold(g)
    got = rf"expected a mapping .* got {type(wrong).__name__}; use dict\(module\.named_parameters"
    for name, run in {
        "reference": [
            lambda: cx.magnitude_threshold(wrong),
            lambda: cx.align_(w, wrong, limits),
            lambda: cx.average_(wrong, w),
        ],
        "current": [lambda: cx.align_(wrong, g, limits), lambda: cx.average_(g, wrong)],
    }.items():
        for action in run:
            with pytest.raises(TypeError, match=f"^{name}: {got}"):
                action()


@pytest.mark.parametrize("wrong", ["0.5", None, True, np.True_, [0.5], torch.tensor(0.5)])
def test_numbers_of_another_type(wrong: Any) -> None:
    g, w = pair()
    got = f"expected a number, got {type(wrong).__name__}"
    with pytest.raises(TypeError, match=f"^top: {got}"):
        cx.magnitude_threshold(g, wrong)
    with pytest.raises(TypeError, match=f"^weight: {got}"):
        cx.average_(g, w, wrong)


@pytest.mark.parametrize(("call", "who", "other"), WRITERS)
def test_unknown_back_ends(call: Call, who: str, other: str) -> None:
    g, w = pair()
    threshold = cx.magnitude_threshold(g)
    for backend, error in (("triton", ValueError), ("cuda", (ValueError, RuntimeError))):
        for run in (
            lambda b: cx.magnitude_threshold(g, backend=b),
            lambda b: cx.align_(w, g, threshold, backend=b),
            lambda b: cx.average_(g, w, backend=b),
        ):
            with pytest.raises(error, match=r"backend|CUDA"):
                run(backend)


@pytest.mark.parametrize("top", [0.0, -0.1, 1.0001, float("nan"), float("inf")])
def test_shares(top: float) -> None:
    with pytest.raises(ValueError, match=rf"top must be in \(0, 1\], not {top}"):
        cx.magnitude_threshold(pair()[0], top)


@pytest.mark.parametrize("weight", [-0.1, 1.5, float("nan"), float("inf")])
def test_weights(weight: float) -> None:
    g, w = pair()
    with pytest.raises(ValueError, match=rf"weight must be in \[0, 1\], not {weight}"):
        cx.average_(g, w, weight)


def test_options() -> None:
    g, w = pair()
    with pytest.raises(ValueError, match="scope must be 'tensor' or 'global', not 'all'"):
        cx.magnitude_threshold(g, scope="all")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="to must be 'zero' or 'global', not 'one'"):
        cx.align_(w, g, cx.magnitude_threshold(g), "one")  # type: ignore[arg-type]


def test_thresholds() -> None:
    g, w = pair()
    good, before = cx.magnitude_threshold(g), copy_of(w)
    bad: list[tuple[dict[str, Any], type[Exception], str]] = [
        ({"t0": good["t0"]}, KeyError, "threshold: tensor 't1' is missing"),
        (good | {"x": good["t0"]}, ValueError, "threshold: 'x' is not in current"),
        (good | {"t1": 0.5}, TypeError, "threshold, tensor 't1': expected a 0-dim float32"),
        (good | {"t1": good["t1"].double()}, TypeError, "threshold, tensor 't1'"),
        (good | {"t1": good["t1"].view(1)}, TypeError, "threshold, tensor 't1'"),
        (good | {"t1": good["t1"].to("meta")}, ValueError, "threshold, tensor 't1'.*meta.*cpu"),
    ]
    for threshold, error, words in bad:
        with pytest.raises(error, match=words):
            cx.align_(w, g, threshold)
    for whole in (0.5, good["t0"], list(good), None):
        with pytest.raises(TypeError, match=rf"threshold: .*{type(whole).__name__}; use what magn"):
            cx.align_(w, g, whole)  # type: ignore[arg-type]
    assert all(same_bytes(w[name], before[name]) for name in w)


# ---- layouts, ties, other entries ----------------------------------------------------------------


def expected_of(call: Call, out: Adapter, read: Adapter) -> Adapter:
    """The same on contiguous copies."""
    result = {name: t.detach().contiguous().clone() for name, t in out.items()}
    call(result, {name: t.detach().contiguous().clone() for name, t in read.items()})
    return result


def images(seed: int) -> Tensor:
    return torch.randn(3, 5, 4, 6, generator=torch.Generator().manual_seed(seed))


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": lambda t: t,
    "channels_last": lambda t: t.to(memory_format=torch.channels_last),
    "transposed": lambda t: t.transpose(0, 3).contiguous().transpose(0, 3),
    "strided": lambda t: torch.stack([t, torch.full_like(t, 7.0)], -1)[..., 0],
    "shifted": lambda t: torch.cat([torch.ones(3), t.reshape(-1)])[3:].view(t.shape),
}


@pytest.mark.parametrize(("call", "who", "other"), WRITERS)
@pytest.mark.parametrize("written", LAYOUTS)
@pytest.mark.parametrize("read", LAYOUTS)
def test_layouts(call: Call, who: str, other: str, written: str, read: str) -> None:
    out, source = {"x": LAYOUTS[written](images(1))}, {"x": LAYOUTS[read](images(2))}
    stride, expected = out["x"].stride(), expected_of(call, out, source)
    assert not torch.equal(expected["x"], images(1))
    call(out, source)
    assert out["x"].stride() == stride
    assert torch.equal(out["x"], expected["x"])
    if written == "strided":
        storage = torch.as_strided(out["x"], (2 * images(1).numel(),), (1,))
        assert (storage[1::2] == 7.0).all()


@pytest.mark.parametrize(("call", "who", "other"), WRITERS)
def test_expanded_inputs(call: Call, who: str, other: str) -> None:
    out, source = {"x": torch.randn(4, 5)}, {"x": torch.ones(5).expand(4, 5)}
    expected = expected_of(call, out, source)
    call(out, source)
    assert torch.equal(out["x"], expected["x"])


def test_thresholds_of_any_layout() -> None:
    values = images(3)
    found = cx.magnitude_threshold({name: place(values) for name, place in LAYOUTS.items()})
    assert len({t.item() for t in found.values()}) == 1
    scalar = torch.tensor(-2.5, dtype=BF16)
    assert cx.magnitude_threshold({"x": scalar})["x"].item() == 2.5


def test_tied_tensors_count_once() -> None:
    shared, other = torch.arange(1.0, 101.0), torch.arange(201.0, 211.0)
    g = {"a": shared, "b": other, "c": shared}
    found = cx.magnitude_threshold(g, 0.1, "global")
    assert list(found) == ["a", "b", "c"]
    # 11 of 110 elements; with the tied tensor twice it would be 21 of 210.
    assert found["c"].item() == 100.0
    w = {"a": -shared, "b": other.clone()}
    w["c"] = w["a"]
    untied = {"a": shared.clone(), "b": other, "c": shared.clone()}
    fraction = cx.align_(w, untied, found)
    assert fraction.item() == 1 / 110
    assert w["a"][-1] == 0
    assert w["c"] is w["a"]
    joined = {"a": torch.zeros(100), "b": torch.zeros(10)}
    joined["c"] = joined["a"]
    cx.average_(joined, untied, 0.5)
    assert torch.equal(joined["c"], shared / 2)


def test_thresholds_by_one_of_the_tied_names() -> None:
    shared = -torch.ones(3)
    g = {"a": torch.ones(3)}
    g["b"] = g["a"]
    assert cx.align_({"a": shared, "b": shared}, g, {"b": torch.tensor(1.0)}).item() == 1.0


def test_thresholds_of_tied_tensors_agree() -> None:
    g = {"a": torch.ones(3), "b": torch.ones(3)}
    w = {"x": torch.ones(2), "a": -torch.ones(3)}
    w["b"] = w["a"]
    g["x"] = torch.ones(2)

    def limits(a: float, b: float) -> Adapter:
        return {"x": torch.tensor(9.0), "a": torch.tensor(a), "b": torch.tensor(b)}

    for a, b in ((2.0, 0.5), (0.5, 2.0), (0.5, torch.nan), (torch.nan, 0.5)):
        words = f"threshold: 'a' and 'b' are tied in current, but have {a} and {b}"
        with pytest.raises(ValueError, match=words):
            cx.align_(w, g, limits(a, b))
    with pytest.raises(TypeError, match="threshold, tensor 'b': expected a 0-dim"):
        cx.align_(w, g, limits(0.5, 0.5) | {"b": 0.5})  # type: ignore[dict-item]
    for same in (torch.nan, torch.inf):
        assert cx.align_(w, g, limits(same, same)).item() == 0.0
    assert (w["a"] == -1).all()
    assert cx.align_(w, g, limits(0.5, 0.5)).item() == 3 / 5


def test_thresholds_of_tied_tensors_are_one_tensor() -> None:
    """So align_ need not compare them, for which it would wait for the device."""
    g = {"a": torch.ones(3), "x": torch.ones(2)}
    g["b"] = g["a"]
    for scope in ("tensor", "global"):
        found = cx.magnitude_threshold(g, scope=scope)
        assert found["a"] is found["b"]
        assert found["a"].data_ptr() != found["x"].data_ptr()


@pytest.mark.parametrize(("call", "who", "other"), WRITERS)
@pytest.mark.parametrize("sides", ["both", "written", "read"])
@pytest.mark.parametrize("extra", [torch.tensor(3), torch.tensor([True, False])])
def test_integers_are_left_alone(
    call: Call, who: str, other: str, sides: str, extra: Tensor
) -> None:
    """Also where the sides differ or only one has them."""
    out, read = pair()
    expected = expected_of(call, out, read)
    differs = ~extra[None]
    if sides != "read":
        out["steps"] = extra.clone()
    if sides != "written":
        read["steps"] = differs.clone()
    assert "steps" not in cx.magnitude_threshold(read)
    call(out, read)
    assert all(same_bytes(out[name], t) for name, t in expected.items())
    if sides != "read":
        assert torch.equal(out["steps"], extra)
    if sides != "written":
        assert torch.equal(read["steps"], differs)


@pytest.mark.parametrize(("call", "who", "other"), WRITERS)
def test_integers_in_place_of_weights(call: Call, who: str, other: str) -> None:
    """A tensor to write is not left alone because the other side has integers there."""
    out, read = pair()
    whole = torch.zeros(7, dtype=torch.int64)
    refuse(call, out, read | {"t1": whole}, TypeError, f"{other}.*'t1'.*int64")


# ---- autograd ------------------------------------------------------------------------------------


@pytest.mark.parametrize(("call", "who", "other"), WRITERS)
def test_live_parameters(call: Call, who: str, other: str) -> None:
    torch.manual_seed(0)
    layer, clone = nn.Linear(30, 20), nn.Linear(30, 20)
    out, read = dict(layer.named_parameters()), dict(clone.named_parameters())
    refuse(call, out, read, RuntimeError, f"{who}.*'weight'.*requires grad.*no_grad")
    expected = expected_of(call, out, read)
    with torch.no_grad():
        call(out, read)
    assert all(same_bytes(out[name].detach(), expected[name]) for name in out)
    assert layer.weight.requires_grad
    assert layer.weight.is_leaf
    thresholds = cx.magnitude_threshold(read)
    assert not any(t.requires_grad for t in thresholds.values())


@pytest.mark.parametrize(("call", "who", "other"), WRITERS)
@pytest.mark.parametrize("layout", ["contiguous", "strided"])
def test_a_saved_tensor_that_is_written(call: Call, who: str, other: str, layout: str) -> None:
    """autograd notices, instead of using values that are not those of the forward pass."""
    saved = LAYOUTS[layout](images(1))
    factor = torch.ones((), requires_grad=True)
    product = (factor * saved).sum()
    version = saved._version
    call({"x": saved}, {"x": images(2)})
    assert saved._version > version
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        product.backward()


def test_reading_does_not_count_as_writing() -> None:
    g, w = pair()
    versions = [t._version for t in g.values()]
    cx.align_(w, g, cx.magnitude_threshold(g))
    assert [t._version for t in g.values()] == versions


def test_inside_inference_mode() -> None:
    g, w = pair()
    expected = expected_of(align, w, g)
    with torch.inference_mode():
        mine = copy_of(w)
        align(mine, g)
        cx.average_(mine, g)
    align(w, g)
    assert all(same_bytes(w[name], expected[name]) for name in w)
