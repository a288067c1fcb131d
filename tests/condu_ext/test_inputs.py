"""What is refused, and that a refusal names the culprit and changes nothing."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from kernel_cases import same_bytes
from torch import Tensor

import condu_ext as cx

Model = dict[str, Tensor]
Use = Callable[[cx.UnifiedDelta, Model, Model | None], Any]


def base_model() -> Model:
    generator = torch.Generator().manual_seed(0)
    return {
        "enc.weight": torch.randn(6, 5, generator=generator),
        "enc.bias": torch.randn(5, generator=generator),
        "steps": torch.tensor([3, 4]),
        "flag": torch.tensor(True),
    }


def tuned(base: Model, seed: int = 1) -> Model:
    generator = torch.Generator().manual_seed(seed)
    return {
        n: t + 0.1 * torch.randn(t.shape, generator=generator)
        if t.is_floating_point()
        else t.clone()
        for n, t in base.items()
    }


USES: dict[str, Use] = {
    "unify alone": lambda s, m, b: cx.unify({"new": m}, b),
    "unify": lambda s, m, b: cx.unify(
        {"old": tuned(b or base_model(), 2) if b else m, "new": m}, b
    ),
    "absorb": lambda s, m, b: cx.absorb(s, "new", m, b),
    "absorb_": lambda s, m, b: cx.absorb_(s, "new", m, b),
    "absorb_ unchecked": lambda s, m, b: cx.absorb_(s, "new", m, b, check=False),
}
FUSING = pytest.mark.parametrize("use", list(USES)[1:])


def snapshot(state: cx.UnifiedDelta) -> dict[str, Any]:
    """Every byte of a state that a user can see."""
    return {
        "tasks": state.tasks,
        "rescalers": [state.rescaler(t) for t in state.tasks],
        **{f"u {n}": t.clone() for n, t in state.delta.items()},
        **{f"{t} {n}": m for t in state.tasks for n, m in state.packed_mask(t).items()},
    }


def assert_unchanged(state: cx.UnifiedDelta, before: dict[str, Any]) -> None:
    after = snapshot(state)
    assert list(after) == list(before)
    for name, value in before.items():
        if isinstance(value, Tensor):
            assert same_bytes(after[name], value), name
        else:
            assert after[name] == value


def refuse(
    use: str,
    model: Model,
    error: type[Exception],
    *words: str,
    base: Model | None = None,
    state: cx.UnifiedDelta | None = None,
) -> None:
    """The use raises, the message has all words, and the state is as it was, and works."""
    base = base_model() if base is None else base
    state = state or cx.unify({"old": tuned(base, 2)}, base)
    before = snapshot(state)
    with pytest.raises(error) as caught:
        USES[use](state, model, base)
    for word in words:
        assert word in str(caught.value), str(caught.value)
    assert_unchanged(state, before)
    cx.decouple(state, "old", base)


# ---- names and shapes ----------------------------------------------------------------------------


@FUSING
def test_missing_tensor(use: str) -> None:
    model = tuned(base_model())
    del model["enc.bias"]
    refuse(use, model, KeyError, "'new'", "'enc.bias'", "missing")


@FUSING
def test_extra_tensor(use: str) -> None:
    model = tuned(base_model()) | {"head": torch.ones(2)}
    refuse(use, model, ValueError, "'new'", "'head'")


@FUSING
def test_other_shape(use: str) -> None:
    """Same number of elements, so only a comparison of shapes can see it."""
    model = tuned(base_model())
    model["enc.weight"] = model["enc.weight"].reshape(5, 6)
    refuse(use, model, ValueError, "'new'", "'enc.weight'", "(5, 6)", "(6, 5)")


@FUSING
def test_not_a_tensor(use: str) -> None:
    model: Any = tuned(base_model()) | {"enc.bias": [1.0] * 5}
    refuse(use, model, TypeError, "'new'", "'enc.bias'", "list")


@pytest.mark.parametrize("use", ["absorb", "absorb_"])
def test_name_of_a_task_in_use(use: str) -> None:
    base = base_model()
    state = cx.unify({"new": tuned(base)}, base)
    before = snapshot(state)
    with pytest.raises(ValueError, match=r"'new'.*already"):
        USES[use](state, tuned(base, 2), base)
    assert_unchanged(state, before)


@pytest.mark.parametrize("name", ["", None, 3])
def test_names_that_are_no_names(name: Any) -> None:
    base = base_model()
    state = cx.unify({"a": tuned(base)}, base)
    for action in (
        lambda: cx.unify({name: tuned(base)}, base),
        lambda: cx.absorb(state, name, tuned(base), base),
        lambda: state.rename("a", name),
    ):
        with pytest.raises(ValueError, match="non-empty string"):
            action()


def test_unknown_task() -> None:
    base = base_model()
    state = cx.unify({"cars": tuned(base), "dtd": tuned(base, 2)}, base)
    actions: list[Callable[[], Any]] = [
        lambda: cx.decouple(state, "food", base),
        lambda: cx.decouple_(state, "food", base, out=tuned(base)),
        lambda: state.mask("food"),
        lambda: state.packed_mask("food"),
        lambda: state.rescaler("food"),
        lambda: state.drop("food"),
        lambda: state.rename("food", "x"),
        lambda: state.private("food"),
    ]
    for action in actions:
        with pytest.raises(KeyError, match=r"'food'.*cars.*dtd"):
            action()
    assert state.tasks == ("cars", "dtd")


def test_nothing_to_unify() -> None:
    with pytest.raises(ValueError, match="no model"):
        cx.unify({}, base_model())
    with pytest.raises(ValueError, match="no floating-point tensor"):
        cx.unify({"a": {"n": torch.tensor(1)}}, None)


def test_pretrained_of_other_names() -> None:
    base = base_model()
    state = cx.unify({"a": tuned(base)}, base)
    other = {f"module.{n}": t for n, t in base.items()}
    with pytest.raises(ValueError, match=r"pretrained.*'module\.enc\.weight'"):
        cx.decouple(state, "a", other)
    with pytest.raises(KeyError, match=r"pretrained.*'enc\.bias'"):
        cx.absorb(state, "b", tuned(base), {n: t for n, t in base.items() if n != "enc.bias"})


# ---- kinds of tensors ----------------------------------------------------------------------------


class Wrapped(Tensor):
    """A subclass that could hold anything."""


def strange_tensors() -> dict[str, Callable[[], Tensor]]:
    def quantised() -> Tensor:
        return torch.quantize_per_tensor(torch.ones(5), 0.1, 0, torch.qint8)

    return {
        "float64": lambda: torch.ones(5, dtype=torch.float64),
        "float8_e4m3fn": lambda: torch.ones(5).to(torch.float8_e4m3fn),
        "complex64": lambda: torch.ones(5, dtype=torch.complex64),
        "sparse": lambda: torch.ones(5).to_sparse(),
        "meta": lambda: torch.ones(5, device="meta"),
        "quantised": quantised,
        "Wrapped": lambda: torch.ones(5).as_subclass(Wrapped),
    }


@pytest.mark.filterwarnings("ignore:.*[Qq]uantiz")
@FUSING
@pytest.mark.parametrize("kind", list(strange_tensors()))
def test_tensors_that_cannot_be_fused(kind: str, use: str) -> None:
    model = tuned(base_model())
    model["enc.bias"] = strange_tensors()[kind]()
    refuse(use, model, TypeError, "'new'", "'enc.bias'", kind)


@pytest.mark.filterwarnings("ignore:.*[Qq]uantiz")
@pytest.mark.parametrize("kind", list(strange_tensors()))
def test_base_models_that_cannot_be_fused(kind: str) -> None:
    base = base_model() | {"enc.bias": strange_tensors()[kind]()}
    with pytest.raises(TypeError, match=f"pretrained.*'enc.bias'.*{kind}"):
        cx.UnifiedDelta.empty(base)
    with pytest.raises(TypeError, match=f"'enc.bias'.*{kind}"):
        cx.unify({"a": tuned(base_model())}, base)


def test_parameters_and_buffers_are_plain() -> None:
    module = torch.nn.BatchNorm1d(4)
    base = {n: t.detach().clone() for n, t in module.state_dict().items()}
    with torch.no_grad():
        module.weight.add_(1.0)
    live = dict(module.named_parameters()) | dict(module.named_buffers())
    state = cx.unify({"a": live}, base)
    assert state.delta["weight"].tolist() == [1.0] * 4
    assert not state.delta["weight"].requires_grad
    buffer = torch.nn.Buffer(torch.ones(2))
    assert cx.unify({"a": {"w": buffer}}, None).delta["w"].tolist() == [1.0, 1.0]


# ---- values that are not finite ------------------------------------------------------------------


@pytest.mark.parametrize("side", ["model", "base"])
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("use", ["unify", "absorb", "absorb_"])
def test_values_that_are_not_finite(use: str, value: float, side: str) -> None:
    base = base_model()
    state = cx.unify({"old": tuned(base, 2)}, base)
    before = snapshot(state)
    model = tuned(base)
    broken = {"model": model, "base": base}[side]
    broken["enc.bias"][3] = value
    with pytest.raises(ValueError, match=r"enc\.bias") as caught:
        USES["unify alone" if use == "unify" else use](state, model, base)
    assert "'new'" in str(caught.value)
    assert "NaN or infinite" in str(caught.value)
    assert_unchanged(state, before)


@pytest.mark.parametrize("use", ["unify", "absorb", "absorb_"])
def test_infinity_in_both_is_not_finite(use: str) -> None:
    """∞ − ∞ is NaN: what did not change is no excuse."""
    base = base_model()
    state = cx.unify({"old": tuned(base, 2)}, base)
    base["enc.bias"][3] = torch.inf
    with pytest.raises(ValueError, match=r"enc\.bias"):
        USES[use](state, tuned(base), base)
    cx.decouple(state, "old", base_model())


def test_the_second_of_two_models_is_named() -> None:
    models = {"a": {"w": torch.ones(3)}, "b": {"w": torch.tensor([1.0, torch.nan, 1.0])}}
    with pytest.raises(ValueError, match="task 'b', tensor 'w'"):
        cx.unify(models, None)


def test_a_difference_that_overflows() -> None:
    largest = torch.finfo(torch.float32).max
    with pytest.raises(ValueError, match="task 'a', tensor 'w'"):
        cx.unify({"a": {"w": torch.tensor([largest])}}, {"w": torch.tensor([-largest])})


@pytest.mark.parametrize("backend", ["reference", None])
def test_unchecked_absorb_loses_the_state(backend: str | None) -> None:
    """Found too late: the error says so, and so does every later use."""
    base = base_model()
    state = cx.unify({"old": tuned(base)}, base)
    model = tuned(base, 2)
    model["enc.bias"][0] = torch.nan
    with pytest.raises(ValueError, match=r"enc\.bias") as caught:
        cx.absorb_(state, "new", model, base, check=False, backend=backend)
    assert "lost" in str(caught.value)
    other = cx.unify({"x": tuned(base)}, base)
    uses: list[Callable[[], Any]] = [
        lambda: cx.decouple(state, "old", base),
        lambda: cx.decouple_(state, "old", base, out=tuned(base)),
        lambda: cx.absorb(state, "next", tuned(base), base),
        lambda: cx.absorb_(state, "next", tuned(base), base),
        lambda: cx.merge(state, other),
        lambda: cx.merge(other, state),
        lambda: state.delta,
        lambda: state.mask("old"),
        lambda: state.rescaler("old"),
        lambda: state.to("cpu"),
        lambda: state.drop("old"),
    ]
    for use in uses:
        with pytest.raises(RuntimeError, match=r"'new'.*lost"):
            use()


def test_unchecked_absorb_of_good_values() -> None:
    base = base_model()
    model = tuned(base, 2)
    state = cx.unify({"old": tuned(base)}, base)
    expected = cx.absorb(state, "new", model, base)
    cx.absorb_(state, "new", model, base, check=False)
    assert_unchanged(state, snapshot(expected))


# ---- integers ------------------------------------------------------------------------------------


@FUSING
@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("steps", torch.tensor([3, 5])),
        ("steps", torch.tensor([3])),
        ("steps", torch.tensor([3, 4], dtype=torch.int32)),
        ("steps", torch.tensor([3.0, 4.0])),
        ("flag", torch.tensor(False)),
    ],
)
def test_integers_that_differ(name: str, value: Tensor, use: str) -> None:
    refuse(use, tuned(base_model()) | {name: value}, ValueError, "'new'", f"'{name}'")


@FUSING
def test_float_where_the_base_has_it_as_integer(use: str) -> None:
    model = tuned(base_model()) | {"enc.bias": torch.ones(5, dtype=torch.int64)}
    refuse(use, model, TypeError, "'new'", "'enc.bias'", "int64")


def test_integers_of_a_delta_are_zero() -> None:
    delta = {"w": torch.ones(3), "n": torch.tensor([0, 0])}
    assert cx.unify({"a": delta}, None).tasks == ("a",)
    with pytest.raises(ValueError, match="'n'"):
        cx.unify({"a": delta | {"n": torch.tensor([0, 1])}}, None)


def test_integers_may_be_left_out_of_a_model() -> None:
    """``dict(module.named_parameters())`` has no counters; decouple takes them from the base."""
    base = base_model()
    parameters = {n: t for n, t in tuned(base).items() if t.is_floating_point()}
    state = cx.unify({"a": parameters}, base)
    theta = cx.decouple(state, "a", base)
    assert set(theta) == set(base)
    assert theta["steps"].tolist() == [3, 4]
    assert theta["steps"].data_ptr() != base["steps"].data_ptr()


# ---- missing="unchanged" -------------------------------------------------------------------------


@pytest.mark.parametrize("with_base", [True, False])
def test_missing_tensors_taken_as_unchanged(with_base: bool) -> None:
    base = {n: t for n, t in base_model().items() if t.is_floating_point()}
    start = base if with_base else None
    full = tuned(base) if with_base else {n: torch.ones_like(t) for n, t in base.items()}
    part = {"enc.bias": full["enc.bias"]}
    filled = part | {"enc.weight": base["enc.weight"] if with_base else torch.zeros(6, 5)}
    expected = cx.unify({"a": full, "b": filled}, start)
    found = cx.unify({"a": full, "b": part}, start, missing="unchanged")
    assert_unchanged(found, snapshot(expected))
    state = cx.unify({"a": full}, start)
    found = cx.absorb(state, "b", part, start, missing="unchanged")
    assert_unchanged(found, snapshot(cx.absorb(state, "b", filled, start)))
    cx.absorb_(state, "b", part, start, missing="unchanged")
    assert_unchanged(state, snapshot(found))


def test_missing_has_two_values() -> None:
    with pytest.raises(ValueError, match="missing must be 'error' or 'unchanged', not 'skip'"):
        cx.unify({"a": tuned(base_model())}, base_model(), missing="skip")


def test_extra_tensors_are_refused_all_the_same() -> None:
    model = {"enc.wieght": torch.ones(6, 5)}
    with pytest.raises(ValueError, match=r"enc\.wieght"):
        cx.unify({"a": model}, base_model(), missing="unchanged")


# ---- dtypes and match_dtype ----------------------------------------------------------------------


@FUSING
@pytest.mark.parametrize("narrow", [torch.bfloat16, torch.float16])
def test_narrower_than_the_base(narrow: torch.dtype, use: str) -> None:
    model = {
        n: t.to(narrow) if t.is_floating_point() else t for n, t in tuned(base_model()).items()
    }
    refuse(
        use, model, ValueError, "'new'", "'enc.weight'", str(narrow), "torch.float32", "match_dtype"
    )


@pytest.mark.parametrize(
    ("dtype", "start"), [(torch.bfloat16, torch.float16), (torch.float16, torch.bfloat16)]
)
def test_the_16_bit_types_are_narrower_than_each_other(
    dtype: torch.dtype, start: torch.dtype
) -> None:
    base = {"w": torch.randn(50).to(start)}
    with pytest.raises(ValueError, match=f"'w'.*{dtype}.*{start}"):
        cx.unify({"a": {"w": base["w"].to(dtype)}}, base)
    state = cx.unify({"a": {"w": base["w"].to(dtype)}}, base, match_dtype=True)
    assert state.rescaler("a") == 0.0


def test_wider_than_the_base_is_fine() -> None:
    base = {"w": torch.randn(50).to(torch.bfloat16)}
    model = {"w": base["w"].float() + 2.0**-12}
    state = cx.unify({"a": model}, base)
    assert state.delta["w"].tolist() == [2.0**-12] * 50
    assert cx.decouple(state, "a", base)["w"].dtype == torch.bfloat16


@pytest.mark.parametrize("how", ["unify", "absorb", "absorb_"])
@pytest.mark.parametrize("narrow", [torch.bfloat16, torch.float16])
def test_match_dtype(narrow: torch.dtype, how: str) -> None:
    """Deltas start at the rounded base, and so does what is decoupled, in the base's own dtype."""
    base = {"w": torch.randn(500), "v": torch.randn(9)}
    rounded = {n: t.to(narrow).float() for n, t in base.items()}
    model = {n: t.to(narrow) for n, t in base.items()}
    model["w"][:250] += 0.5
    if how == "unify":
        state = cx.unify({"a": model}, base, match_dtype=True)
    else:
        state = cx.UnifiedDelta.empty(base)
        if how == "absorb":
            state = cx.absorb(state, "a", model, base, match_dtype=True)
        else:
            cx.absorb_(state, "a", model, base, match_dtype=True)
    assert torch.equal(state.delta["w"], model["w"].float() - rounded["w"])
    assert not state.mask("a")["w"][250:].any()
    assert not state.delta["v"].any()
    theta = cx.decouple(state, "a", base)
    assert theta["w"].dtype == torch.float32
    assert torch.equal(theta["w"][250:], rounded["w"][250:])
    assert torch.equal(theta["w"], model["w"].float())
    assert torch.equal(theta["v"], rounded["v"])
    # Later tasks must start there too.
    with pytest.raises(ValueError, match=r"'b'.*'w'.*earlier tasks"):
        cx.absorb(state, "b", {n: t + 0.1 for n, t in base.items()}, base, match_dtype=True)
    state = cx.absorb(state, "b", model, base, match_dtype=True)
    assert state.rescaler("b") == 1.0


def test_match_dtype_of_a_state_that_started_wide() -> None:
    base = {"w": torch.randn(50)}
    state = cx.unify({"a": {"w": base["w"] + 0.1}}, base)
    before = snapshot(state)
    narrow = {"w": (base["w"] + 0.1).to(torch.bfloat16)}
    with pytest.raises(ValueError, match=r"'b'.*'w'.*bfloat16.*float32"):
        cx.absorb(state, "b", narrow, base, match_dtype=True)
    assert_unchanged(state, before)


def test_match_dtype_with_a_missing_tensor() -> None:
    """What is missing is the base's own, rounded where other tasks round it: no delta."""
    base = {"w": torch.randn(50), "v": torch.randn(9)}
    first = {n: (t + 0.5).to(torch.bfloat16) for n, t in base.items()}
    state = cx.unify({"a": first}, base, match_dtype=True)
    state = cx.absorb(state, "b", {"w": first["w"]}, base, match_dtype=True, missing="unchanged")
    assert not state.mask("b")["v"].any()
    assert state.mask("b")["w"].any()


def test_match_dtype_changes_nothing_for_equal_dtypes() -> None:
    base = base_model()
    models = {"a": tuned(base), "b": tuned(base, 2)}
    assert_unchanged(cx.unify(models, base, match_dtype=True), snapshot(cx.unify(models, base)))


# ---- backends ------------------------------------------------------------------------------------


@pytest.mark.parametrize("use", ["unify", "absorb", "absorb_", "merge", "decouple", "decouple_"])
def test_backends(use: str) -> None:
    base = base_model()
    state, other = cx.unify({"a": tuned(base)}, base), cx.unify({"b": tuned(base, 2)}, base)
    model = tuned(base, 3)
    uses: dict[str, Callable[[str | None], Any]] = {
        "unify": lambda k: cx.unify({"a": model}, base, backend=k),
        "absorb": lambda k: cx.absorb(state, "c", model, base, backend=k),
        "absorb_": lambda k: cx.absorb_(cx.unify({"a": model}, base), "c", model, base, backend=k),
        "merge": lambda k: cx.merge(state, other, backend=k),
        "decouple": lambda k: cx.decouple(state, "a", base, backend=k),
        "decouple_": lambda k: cx.decouple_(state, "a", base, out=tuned(base), backend=k),
    }
    for backend in (None, "cpu", "reference"):
        uses[use](backend)
    with pytest.raises(ValueError, match=r"'cuda'.*cpu"):
        uses[use]("cuda")
    with pytest.raises(ValueError, match="'numpy'"):
        uses[use]("numpy")


def test_backends_agree() -> None:
    base = base_model()
    models = {f"t{k}": tuned(base, k) for k in range(3)}
    states = [cx.unify(models, base, backend=k) for k in ("cpu", "reference")]
    found = [
        cx.absorb(states[0], "n", tuned(base, 9), base, backend=k) for k in ("cpu", "reference")
    ]
    assert found[0].rescaler("t0") == pytest.approx(found[1].rescaler("t0"), rel=4 * 2.0**-23)
    for name, u in found[0].delta.items():
        assert same_bytes(u, found[1].delta[name])
    # λ itself may differ by rounding between states, not between backends over one state.
    thetas = [cx.decouple(found[0], "t1", base, backend=k) for k in ("cpu", "reference")]
    for name, theta in thetas[0].items():
        assert same_bytes(theta, thetas[1][name])


# ---- settings of the process ---------------------------------------------------------------------


def everything(base: Model, models: list[Model], part: Model, zeros: Model) -> dict[str, Any]:
    """What every function of the API makes of the same inputs."""
    state = cx.unify({"a": models[0]}, base)
    state = cx.absorb(state, "b", models[1], base)
    cx.absorb_(state, "c", models[2], base)
    state = cx.merge(state, cx.unify({"d": models[3]}, base)).to("cpu")
    state = cx.absorb(state, "e", part, base, missing="unchanged")
    deltas = cx.unify({"x": zeros | part, "y": part}, None, missing="unchanged")
    thetas = {f"theta {n}": t for n, t in cx.decouple(state, "b", base).items()}
    return snapshot(state) | thetas | {f"delta {n}": t for n, t in deltas.delta.items()}


@pytest.mark.parametrize("setting", ["default dtype", "default device"])
def test_defaults_of_torch_do_not_matter(setting: str) -> None:
    base = base_model()
    part = {"enc.bias": torch.ones(5)}
    zeros = {n: torch.zeros_like(t) for n, t in base.items()}
    inputs = (base, [tuned(base, seed) for seed in range(4)], part, zeros)
    expected = everything(*inputs)
    if setting == "default device":
        with torch.device("meta"):
            found = everything(*inputs)
    else:
        before = torch.get_default_dtype()
        torch.set_default_dtype(torch.float64)
        try:
            found = everything(*inputs)
        finally:
            torch.set_default_dtype(before)
    assert list(found) == list(expected)
    for name, value in expected.items():
        if isinstance(value, Tensor):
            assert same_bytes(found[name], value), name
        else:
            assert found[name] == value


def test_inputs_are_not_changed() -> None:
    base, model = base_model(), tuned(base_model())
    copies = [{n: t.clone() for n, t in m.items()} for m in (base, model)]
    state = cx.unify({"a": model}, base)
    cx.absorb_(state, "b", model, base)
    cx.decouple(state, "a", base)
    for tensors, copy in zip((base, model), copies, strict=True):
        assert all(same_bytes(t, copy[n]) for n, t in tensors.items())


def test_messages_name_task_and_tensor_once_each() -> None:
    """One clear sentence, without a Python object's address in it."""
    model = tuned(base_model())
    model["enc.weight"] = torch.ones(2)
    with pytest.raises(ValueError, match=r"task 'new', tensor 'enc\.weight'") as caught:
        cx.unify({"new": model}, base_model())
    assert not re.search(r"0x[0-9a-f]{4,}", str(caught.value))
    assert "\n" not in str(caught.value)


def test_numpy_arrays_are_no_tensors() -> None:
    with pytest.raises(TypeError, match=r"'w'.*ndarray"):
        cx.unify({"a": {"w": np.ones(3)}}, None)  # type: ignore[dict-item]


@pytest.mark.parametrize("wrong", [[torch.ones(5)], torch.nn.Linear(2, 3), None, 0.5])
def test_models_that_are_no_mappings(wrong: Any) -> None:
    """A module or a list of its parameters: the message says what to use."""
    base = base_model()
    state = cx.unify({"old": tuned(base, 2)}, base)
    actions: list[tuple[str, Callable[[], Any]]] = [
        ("task 'new'", lambda: cx.unify({"new": wrong}, base)),
        ("task 'new'", lambda: cx.unify({"new": wrong}, None)),
        ("task 'new'", lambda: cx.absorb(state, "new", wrong, base)),
        ("task 'new'", lambda: cx.absorb_(state, "new", wrong, base)),
        ("out", lambda: cx.decouple_(state, "old", base, out=wrong)),
        ("pretrained", lambda: state.record_base(wrong)),
    ]
    if wrong is not None:
        actions += [
            ("pretrained", lambda: cx.unify({"new": tuned(base)}, wrong)),
            ("pretrained", lambda: cx.absorb(state, "new", tuned(base), wrong)),
            ("pretrained", lambda: cx.absorb_(state, "new", tuned(base), wrong)),
            ("pretrained", lambda: cx.decouple(state, "old", wrong)),
        ]
    before = snapshot(state)
    hint = r"use dict\(module\.named_parameters\(\)\) or module\.state_dict\(\)"
    for who, action in actions:
        with pytest.raises(TypeError, match=f"^{who}: .* got {type(wrong).__name__}; {hint}"):
            action()
    assert_unchanged(state, before)


def test_negated_views_are_not_written() -> None:
    """The imaginary part of a conjugate: its memory holds the values with the other sign."""
    base = base_model()
    state = cx.unify({"old": tuned(base)}, base)
    out = tuned(base, 3)
    out["enc.bias"] = torch.complex(torch.zeros(5), torch.ones(5)).conj().imag
    before = {name: t.clone() for name, t in out.items()}
    with pytest.raises(ValueError, match=r"out, tensor 'enc\.bias': is a negated view"):
        cx.decouple_(state, "old", base, out=out)
    assert all(torch.equal(t, before[name]) for name, t in out.items())


@pytest.mark.parametrize("models", [torch.nn.Linear(2, 2), [{"w": torch.ones(3)}], "ab"])
def test_models_that_are_no_mapping(models: object) -> None:
    with pytest.raises(TypeError, match="models: expected a mapping from task names to models"):
        cx.unify(models, None)  # type: ignore[arg-type]
