"""UnifiedDelta: a value that is read, renamed, dropped from, moved, and shared between threads."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from kernel_cases import same_bytes
from torch import Tensor

import condu_ext as cx

Model = dict[str, Tensor]
SHAPES = {"w": (30, 7), "b": (9,), "s": ()}


def model(seed: int) -> Model:
    generator = torch.Generator().manual_seed(seed)
    return {n: torch.randn(s, generator=generator) for n, s in SHAPES.items()}


def three_tasks(**options: Any) -> cx.UnifiedDelta:
    return cx.unify({"a": model(1), "b": model(2), "c": model(3)}, model(0), **options)


def snapshot(state: cx.UnifiedDelta) -> dict[str, Any]:
    return {
        "tasks": state.tasks,
        "rescalers": [state.rescaler(t) for t in state.tasks],
        **{f"u {n}": t.clone() for n, t in state.delta.items()},
        **{f"{t} {n}": m for t in state.tasks for n, m in state.packed_mask(t).items()},
        **{f"private {t} {n}": p for t in state.tasks for n, p in state.private(t).items()},
    }


def assert_equal(found: dict[str, Any], expected: dict[str, Any]) -> None:
    assert list(found) == list(expected)
    for name, value in expected.items():
        if isinstance(value, Tensor):
            assert same_bytes(found[name], value), name
        else:
            assert found[name] == value, name


# ---- reading -------------------------------------------------------------------------------------


def test_tasks_stand_in_order_of_joining() -> None:
    state = cx.unify({"z": model(1), "a": model(2)}, model(0))
    state = cx.absorb(state, "m", model(3), model(0))
    other = cx.unify({"b": model(4)}, model(0))
    assert cx.merge(state, other).tasks == ("z", "a", "m", "b")
    assert cx.merge(other, state).tasks == ("b", "z", "a", "m")


def test_masks_packed_and_not() -> None:
    state = three_tasks()
    for task in state.tasks:
        masks, packed = state.mask(task), state.packed_mask(task)
        assert list(masks) == list(packed) == list(SHAPES)
        for name, mask in masks.items():
            assert mask.dtype == torch.bool
            assert mask.shape == torch.Size(SHAPES[name])
            assert packed[name].dtype == torch.uint8
            expected = np.packbits(mask.numpy().reshape(-1), bitorder="little")
            np.testing.assert_array_equal(packed[name].numpy(), expected)


def test_bits_past_the_end_are_zero() -> None:
    """Even where every element of the task is in the mask."""
    for numel in (1, 7, 8, 9, 511, 513):
        state = cx.unify({"a": {"w": torch.ones(numel)}}, None, rule=cx.FusionRule("positive"))
        state = cx.absorb(state, "b", {"w": torch.ones(numel)}, None)
        for task in state.tasks:
            packed = state.packed_mask(task)["w"]
            assert packed.numel() == (numel + 7) // 8
            assert int(packed[-1]) == (1 << ((numel - 1) % 8 + 1)) - 1


def test_what_is_read_is_a_copy_unless_it_says_so() -> None:
    state = three_tasks(private=())
    before = snapshot(state)
    for task in state.tasks:
        for tensor in [*state.mask(task).values(), *state.packed_mask(task).values()]:
            tensor.zero_()
        for tensor in cx.decouple(state, task, model(0)).values():
            tensor.zero_()
        for tensor in cx.decouple(state, task, None).values():
            tensor.zero_()
    assert_equal(snapshot(state), before)


def test_size_in_bytes() -> None:
    """4 (2) bytes a parameter, a bit a parameter and task; padding and sums are small."""
    numel = 1 << 16
    for dtype, width in ((torch.float32, 4), (torch.bfloat16, 2)):
        models = {f"t{k}": {"w": torch.randn(numel)} for k in range(8)}
        state = cx.unify(models, None, dtype=dtype)
        exact = numel * width + 8 * numel // 8
        assert exact <= state.nbytes <= exact + 1000
        state.drop("t0")
        assert state.nbytes <= exact - numel // 8 + 1000


def test_repr_says_what_it_is() -> None:
    assert "3 tasks, 3 tensors, 220 parameters, torch.float32" in repr(three_tasks())


def test_empty() -> None:
    state = cx.UnifiedDelta.empty(model(0))
    assert state.tasks == ()
    assert all(not t.any() for t in state.delta.values())
    with pytest.raises(KeyError, match="unknown task 'a'"):
        state.rescaler("a")
    joined = cx.absorb(state, "a", model(1), model(0))
    assert_equal(snapshot(joined), snapshot(cx.unify({"a": model(1)}, model(0))))
    assert state.tasks == ()
    merged = cx.merge(state, cx.merge(joined, cx.UnifiedDelta.empty(model(0))))
    assert_equal(snapshot(merged), snapshot(joined))
    assert cx.merge(state, state).tasks == ()


# ---- states are values ---------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["absorb", "merge", "to"])
def test_a_new_state_shares_nothing(how: str) -> None:
    """Everything that writes is done to one state; the other keeps every byte."""
    base = model(0)

    def derive(state: cx.UnifiedDelta) -> cx.UnifiedDelta:
        if how == "absorb":
            return cx.absorb(state, "d", model(4), base)
        if how == "merge":
            return cx.merge(state, cx.unify({"d": model(4)}, base, private=("b",)))
        return state.to("cpu")

    def change(state: cx.UnifiedDelta) -> None:
        cx.absorb_(state, "more", model(9), base)
        state.rename("b", "renamed")
        state.drop("a")
        for tensor in state.delta.values():
            tensor.fill_(7.0)

    state = three_tasks(private=("b",))
    derived = derive(state)
    before = snapshot(derived)
    change(state)
    assert_equal(snapshot(derived), before)

    state = three_tasks(private=("b",))
    derived, before = derive(state), snapshot(state)
    change(derived)
    assert_equal(snapshot(state), before)


def test_private_tensors_are_copies() -> None:
    first = model(1)
    state = cx.unify({"a": first}, model(0), private=("b",))
    expected = first["b"].clone()
    first["b"].zero_()
    state.private("a")["b"].zero_()
    cx.decouple(state, "a", model(0))["b"].zero_()
    out = model(5)
    cx.decouple_(state, "a", model(0), out=out)
    out["b"].zero_()
    assert torch.equal(state.private("a")["b"], expected)


# ---- drop, rename, to ----------------------------------------------------------------------------


def test_drop() -> None:
    state = three_tasks()
    before = snapshot(state)
    state.drop("b")
    assert state.tasks == ("a", "c")
    after = snapshot(state)
    for name, value in after.items():
        if isinstance(value, Tensor):
            assert same_bytes(value, before[name])
    assert after["rescalers"] == [before["rescalers"][0], before["rescalers"][2]]
    with pytest.raises(KeyError, match="'b'"):
        state.rescaler("b")


def test_replace_is_drop_then_absorb() -> None:
    state = three_tasks()
    state.drop("b")
    state = cx.absorb(state, "b", model(8), model(0))
    assert state.tasks == ("a", "c", "b")


def test_dropped_tasks_do_not_vote() -> None:
    """u stays, but nobody claims it: the next task wins every element."""
    state = three_tasks()
    for task in state.tasks:
        state.drop(task)
    assert state.tasks == ()
    state = cx.absorb(state, "new", model(4), model(0))
    assert_equal(snapshot(state), snapshot(cx.unify({"new": model(4)}, model(0))))


def test_rename() -> None:
    state = three_tasks(private=("b",))
    expected = snapshot(state)
    state.rename("b", "neu: Größe/ß")
    assert state.tasks == ("a", "neu: Größe/ß", "c")
    found = snapshot(state)
    assert same_bytes(found["neu: Größe/ß w"], expected["b w"])
    assert same_bytes(found["private neu: Größe/ß b"], expected["private b b"])
    assert found["rescalers"] == expected["rescalers"]
    with pytest.raises(ValueError, match=r"'c'.*already"):
        state.rename("a", "c")
    with pytest.raises(ValueError, match=r"'a'.*already"):
        state.rename("a", "a")
    state.rename("a", "b")  # the old name is free again


@pytest.mark.parametrize("tasks", [0, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_to_the_same_device(dtype: torch.dtype, tasks: int) -> None:
    rule = cx.FusionRule("zero", "per_tensor")
    state = three_tasks(dtype=dtype, rule=rule, private=("b",))
    for task in state.tasks[tasks:]:
        state.drop(task)
    state.record_base(model(0), "tiny")
    copy = state.to("cpu")
    assert_equal(snapshot(copy), snapshot(state))
    assert (copy.rule, copy.dtype, copy.base_name) == (rule, dtype, "tiny")
    assert copy.base_fingerprints == state.base_fingerprints
    for s in (copy, state):
        cx.absorb_(s, "d", model(4), model(0))
    assert_equal(snapshot(copy), snapshot(state))


# ---- merge ---------------------------------------------------------------------------------------


def test_merge_refuses_states_that_differ() -> None:
    base = model(0)
    state = three_tasks()
    others = {
        "'a'": cx.unify({"a": model(4)}, base),
        "rule": cx.unify({"d": model(4)}, base, rule=cx.FusionRule("zero")),
        "dtype": cx.unify({"d": model(4)}, base, dtype=torch.bfloat16),
        "private": cx.unify({"d": model(4)}, base, private=("x",)),
        "tensor": cx.unify({"d": {n: model(4)[n] for n in "wb"}}, {n: base[n] for n in "wb"}),
        "shape": cx.unify({"d": {"w": torch.ones(7, 30)}}, None),
    }
    before = snapshot(state)
    for word, other in others.items():
        for pair in ((state, other), (other, state)):
            with pytest.raises(ValueError, match=word):
                cx.merge(*pair)
    assert_equal(snapshot(state), before)


def test_merge_refuses_other_base_models() -> None:
    a, b = three_tasks(), cx.unify({"d": model(4)}, model(0))
    a.record_base(model(0))
    b.record_base(model(5))
    with pytest.raises(ValueError, match=r"base models.*'w'"):
        cx.merge(a, b)


@pytest.mark.parametrize("recorded", ["left", "right", "both"])
def test_merge_keeps_what_is_known_of_the_base(recorded: str) -> None:
    a, b = three_tasks(), cx.unify({"d": model(4)}, model(0))
    if recorded != "right":
        a.record_base(model(0), "tiny")
    if recorded != "left":
        b.record_base(model(0), "tiny")
    merged = cx.merge(a, b)
    assert merged.base_name == "tiny"
    merged.verify_base(model(0))


def test_merge_with_private_tensors() -> None:
    a = cx.unify({"a": model(1)}, model(0), private=("b",))
    b = cx.unify({"c": model(2)}, model(0), private=("b",))
    merged = cx.merge(a, b)
    assert torch.equal(merged.private("a")["b"], model(1)["b"])
    assert torch.equal(merged.private("c")["b"], model(2)["b"])


# ---- the base model's fingerprint ----------------------------------------------------------------


def test_fingerprints_of_the_base() -> None:
    base = model(0)
    state = three_tasks()
    with pytest.raises(ValueError, match="record_base"):
        state.verify_base(base)
    state.record_base(base, "tiny")
    state.verify_base({n: t.clone() for n, t in base.items()})
    later = cx.absorb(state, "d", model(4), base)
    other = {n: t.clone() for n, t in base.items()}
    other["b"][4] = torch.nextafter(other["b"][4], torch.tensor(9.0))
    for known in (state, later):
        with pytest.raises(ValueError, match=r"'b'.*tiny"):
            known.verify_base(other)
    with pytest.raises(KeyError, match="'b'"):
        state.verify_base({"w": base["w"], "s": base["s"]})


def test_fingerprints_do_not_depend_on_strides() -> None:
    base = {"w": torch.randn(6, 5)}
    state = cx.unify({"a": {"w": torch.randn(6, 5)}}, base)
    state.record_base({"w": base["w"].t().contiguous().t()})
    state.verify_base(base)


# ---- private patterns ----------------------------------------------------------------------------


def with_head(seed: int, classes: int) -> Model:
    generator = torch.Generator().manual_seed(seed)
    return model(seed) | {
        "head.weight": torch.randn(classes, 4, generator=generator),
        "head.count": torch.tensor(seed),
        "bn.mean": torch.randn(3, dtype=torch.float64, generator=generator),
    }


PRIVATE = ("head.*", "*.mean")


def test_private_tensors_belong_to_their_task() -> None:
    """Any shape, dtype and value, per task; nothing of them is fused."""
    base = with_head(0, 2)
    state = cx.unify({"a": with_head(1, 10)}, base, private=PRIVATE)
    state = cx.absorb(state, "b", with_head(2, 20), base)
    cx.absorb_(state, "c", with_head(3, 30), base)
    assert set(state.delta) == set(SHAPES)
    for task, seed, classes in (("a", 1, 10), ("b", 2, 20), ("c", 3, 30)):
        theta = cx.decouple(state, task, base)
        assert set(theta) == set(base)
        for name in ("head.weight", "head.count", "bn.mean"):
            assert same_bytes(theta[name], with_head(seed, classes)[name])
        out = with_head(9, classes)
        cx.decouple_(state, task, base, out=out)
        for name, tensor in theta.items():
            assert same_bytes(out[name], tensor)
    state.drop("b")
    assert set(state.private("c")) == {"head.weight", "head.count", "bn.mean"}


def test_private_tensors_may_be_not_finite() -> None:
    state = cx.unify(
        {"a": {"w": torch.ones(2), "h": torch.tensor([torch.nan])}}, None, private=("h",)
    )
    assert state.private("a")["h"].isnan().all()


@pytest.mark.parametrize("how", ["unify", "absorb", "absorb_"])
def test_private_tensors_of_the_base_must_be_given(how: str) -> None:
    """Or decoupling would leave the head of whoever was decoupled before."""
    base = with_head(0, 2)
    state = cx.unify({"a": with_head(1, 10)}, base, private=PRIVATE)
    part = {n: t for n, t in with_head(2, 20).items() if n != "head.weight"}
    uses: dict[str, Callable[[], Any]] = {
        "unify": lambda: cx.unify({"b": part}, base, private=PRIVATE),
        "absorb": lambda: cx.absorb(state, "b", part, base),
        "absorb_": lambda: cx.absorb_(state, "b", part, base),
    }
    with pytest.raises(KeyError, match=r"'b'.*'head\.weight'"):
        uses[how]()
    assert state.tasks == ("a",)
    allowed = cx.absorb(state, "b", part, base, missing="unchanged")
    assert "head.weight" not in allowed.private("b")
    # Unchanged is the base's own, also where another expert was written before.
    assert same_bytes(cx.decouple(allowed, "b", base)["head.weight"], base["head.weight"])


def test_private_is_a_tuple() -> None:
    with pytest.raises(TypeError, match=r"private.*'head'"):
        cx.UnifiedDelta.empty(model(0), private="head")
    with pytest.raises(TypeError, match=r"private.*'head'"):
        cx.unify({"a": model(1)}, model(0), private="head")


def test_private_needs_a_place_in_the_output() -> None:
    base = with_head(0, 2)
    state = cx.unify({"a": with_head(1, 10)}, base, private=PRIVATE)
    out = with_head(9, 10)
    del out["head.weight"]
    with pytest.raises(KeyError, match=r"head\.weight"):
        cx.decouple_(state, "a", base, out=out)
    out = with_head(9, 11)
    kept = {n: t.clone() for n, t in out.items()}
    with pytest.raises(ValueError, match=r"head\.weight.*\(11, 4\).*\(10, 4\)"):
        cx.decouple_(state, "a", base, out=out)
    assert all(same_bytes(t, kept[n]) for n, t in out.items())


# ---- threads -------------------------------------------------------------------------------------


def run_threads(actions: list[Any]) -> list[BaseException]:
    """Runs the actions at once; their exceptions. A deadlock is an exception too."""
    errors: list[BaseException] = []
    ready = threading.Barrier(len(actions))

    def work(action: Any) -> None:
        try:
            ready.wait()
            action()
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=(a,), daemon=True) for a in actions]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=20)
        if thread.is_alive():
            errors.append(TimeoutError("a thread does not end"))
            break
    return errors


def test_threads_that_absorb_and_read_one_state() -> None:
    """The result is that of some order, and no reader ever sees half of a step."""
    base = model(0)
    state = cx.unify({"start": model(1)}, base)
    names = [f"t{k}" for k in range(6)]

    def read() -> None:
        for _ in range(20):
            for task in state.tasks:
                theta = cx.decouple(state, task, base)
                assert all(t.isfinite().all() for t in theta.values())

    absorbers = [
        lambda k=k, n=n: cx.absorb_(state, n, model(10 + k), base) for k, n in enumerate(names)
    ]
    assert run_threads([*absorbers, read, read]) == []
    assert sorted(state.tasks) == sorted(["start", *names])
    expected = cx.unify({"start": model(1)}, base)
    for name in state.tasks[1:]:
        cx.absorb_(expected, name, model(10 + names.index(name)), base)
    assert_equal(snapshot(state), snapshot(expected))


def test_threads_on_states_of_their_own() -> None:
    base = model(0)
    expected = snapshot(three_tasks())
    found: list[dict[str, Any]] = []

    def work() -> None:
        torch.set_num_threads(1)
        for _ in range(5):
            state = cx.absorb(cx.unify({"a": model(1), "b": model(2)}, base), "c", model(3), base)
            cx.decouple(state, "a", base)
            found.append(snapshot(three_tasks()))

    assert run_threads([work] * 4) == []
    assert len(found) == 20
    for state in found:
        assert_equal(state, expected)


def test_merges_in_both_directions_do_not_wait_for_each_other() -> None:
    a, b = cx.unify({"a": model(1)}, model(0)), cx.unify({"b": model(2)}, model(0))

    def merge(left: cx.UnifiedDelta, right: cx.UnifiedDelta) -> None:
        for _ in range(30):
            cx.merge(left, right)

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        errors = run_threads([lambda: merge(a, b), lambda: merge(b, a)] * 2)
    finally:
        sys.setswitchinterval(interval)
    assert errors == []
