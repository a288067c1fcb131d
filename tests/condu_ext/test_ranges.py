"""Ranges of a model: the same bytes as the whole model, however it is cut."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_cases import BF16, DTYPES, F16, F32, differing, make_case, run, same_bytes
from range_operators import RULES, InRanges
from torch import Tensor

import condu_ext as cx
from condu_ext import _C, _native, _ops, decoupling, fusion, merging, ranges
from condu_ext.ranges import StateRange

SIZES = (3 * 65536 + 3, 7, 131072, 0, 65537)
SEEDS = st.integers(0, 2**32)


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert list(found) == list(expected)
    for name, value in found.items():
        assert same_bytes(value, expected[name]), f"{name}: {differing(value, expected[name])}"


# ---- cut and whole -------------------------------------------------------------------------------


@settings(max_examples=12)
@given(
    kind=st.sampled_from(list(DTYPES)),
    state=st.sampled_from([F32, BF16]),
    zero_sum=st.integers(0, 2),
    tasks=st.sampled_from([1, 2, 5, 9]),
    seed=SEEDS,
)
def test_operators(kind: str, state: torch.dtype, zero_sum: int, tasks: int, seed: int) -> None:
    """Whole arenas, padding included, chunk sums, decoupled weights and what is round them."""
    case = make_case(SIZES, tasks, kind, state, zero_sum)
    assert_same(run(InRanges(seed), case), run(_ops, case))


@settings(max_examples=6)
@given(kind=st.sampled_from(["fp32", "bf16", "fp16", "mixed"]), seed=SEEDS)
def test_rounding_of_the_base(kind: str, seed: int) -> None:
    case = make_case(SIZES, 2, kind)
    case.via = [(0, 1, 2)[k % 3] for k in range(len(SIZES))]
    narrow = [None, BF16, F16]
    case.models = [
        [t.to(narrow[code] or t.dtype) for t, code in zip(model, case.via, strict=True)]
        for model in case.models
    ]
    case.via = [
        0 if b.dtype == narrow[code] else code for b, code in zip(case.base, case.via, strict=True)
    ]
    assert_same(run(InRanges(seed), case), run(_ops, case))


def test_threads_of_a_call(monkeypatch: pytest.MonkeyPatch) -> None:
    """As many as the caller says, whatever PyTorch uses."""
    case = make_case(SIZES, 3, "mixed")
    expected = run(_ops, case)
    used: dict[str, set[int]] = {}

    class Kernels:
        def __getattr__(self, name: str) -> Callable[..., Any]:
            def call(*arguments: Any) -> Any:
                used.setdefault(name, set()).add(arguments[-1])
                return getattr(_C, name)(*arguments)

            return call

    monkeypatch.setattr(_native, "_C", Kernels())
    found = run(InRanges(0, threads=3), case)
    used.pop("measure")
    assert used == {name: {3} for name in ("unify", "absorb", "merge", "decouple")}
    assert_same(found, expected)


def beside_one_another(work: Callable[[int], None], workers: int) -> None:
    """``work(0)``, ``work(1)``, … in threads."""
    with ThreadPoolExecutor(workers) as pool:
        list(pool.map(work, range(workers)))  # raises what a worker raised


def test_calls_beside_one_another() -> None:
    """What a pool of workers does, each with memory of its own."""
    case = make_case(SIZES, 3, "bf16")
    found: dict[int, dict[str, Tensor]] = {}

    def work(seed: int) -> None:
        found[seed] = run(InRanges(seed), case)

    beside_one_another(work, workers=4)
    for seed in range(4):
        assert_same(found[seed], run(_ops, case))


def model_of(tensors: list[Tensor]) -> dict[str, Tensor]:
    return {f"w{k}": t for k, t in enumerate(tensors)}


def api(tensors: list[list[Tensor]], rule: cx.FusionRule, dtype: torch.dtype) -> dict[str, Any]:
    """Unify three models, absorb one, merge with a state of two, decouple: everything by name.
    Base first; fine-tuned models may be narrower."""
    base, *tuned = (model_of(model) for model in tensors)
    names, match = [f"t{k}" for k in range(6)], {"match_dtype": True}
    models = dict(zip(names, tuned, strict=True))

    def unify(tasks: list[str]) -> cx.UnifiedDelta:
        return cx.unify({t: models[t] for t in tasks}, base, rule=rule, dtype=dtype, **match)

    absorbed = cx.absorb(unify(names[:3]), "t5", models["t5"], base, **match)
    state = cx.merge(absorbed, unify(names[3:5]))
    results: dict[str, Any] = dict(state.delta)
    for task in state.tasks:
        results[f"λ of {task}"] = state.rescaler(task)
        results |= {f"{task} {n}": t for n, t in state.packed_mask(task).items()}
        results |= {f"{task} of {n}": t for n, t in cx.decouple(state, task, base).items()}
    return results


@pytest.mark.parametrize("rescale", ["global", "tensor_mean", "per_tensor"])
@pytest.mark.parametrize(
    ("base", "tuned", "dtype"),
    [(F32, F32, F32), (BF16, BF16, BF16), (F32, BF16, F32), (F32, F16, BF16), (F16, F32, F32)],
)
def test_everything_by_name(
    base: torch.dtype,
    tuned: torch.dtype,
    dtype: torch.dtype,
    rescale: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The API over operators in ranges: rescalers from their sums, per task and per tensor."""
    case = make_case((3 * 65536 + 3, 400, 131072), 3, "fp32")
    models = [[t.to(base) for t in case.base], *([t.to(tuned) for t in m] for m in case.models)]
    for zero_sum in ("negative", "positive", "zero"):
        rule = cx.FusionRule(zero_sum=zero_sum, rescale=rescale)
        expected = api(models, rule, dtype)
        with monkeypatch.context() as patch:
            for module in (fusion, merging, decoupling):
                patch.setattr(module, "kernels_for", lambda *_: InRanges(1))
            found = api(models, rule, dtype)
        assert list(found) == list(expected)
        for name, value in expected.items():
            if isinstance(value, Tensor):
                assert same_bytes(found[name], value), name
            else:
                assert found[name] == value, name


def test_a_cut_elsewhere_shows() -> None:
    """Chunk sums depend on where chunks begin, so that the tests above can fail."""
    case = make_case((2 * 65536,), 2, "fp32")
    out = StateRange.empty([65536], 2, F32)
    whole = _ops.unify([t for m in case.models[:2] for t in m], case.base, 2, 0, F32, [])[2]
    sums = [
        ranges.unify(
            [[m[0][at : at + 65536]] for m in case.models[:2]],
            [case.base[0][at : at + 65536]],
            out,
            rule=RULES[0],
        )
        for at in (65536, 32768)
    ]
    assert torch.equal(sums[0], whole[:, 1:])
    assert not torch.equal(sums[1], whole[:, 1:])


# ---- memory --------------------------------------------------------------------------------------


def test_narrowed_memory_is_shared() -> None:
    memory = StateRange.empty([5000, 1], 2, BF16)
    memory.u.zero_()  # there may be anything in it
    part = memory.narrowed([700, 0, 2])
    assert (part.u.numel(), part.planes[1].numel()) == (1536, 192)
    part.u.fill_(3)
    assert (memory.u == 3).sum() == 1536
    with pytest.raises(ValueError, match=r"1536 .* 1024"):
        part.narrowed([1, 1]).narrowed([1, 1, 1])


def unify_once(out: StateRange, **changes: Any) -> Tensor:
    arguments: dict[str, Any] = {
        "models": [[torch.ones(600)], [-torch.ones(600)]],
        "base": [torch.zeros(600)],
        "rule": RULES[0],
    }
    arguments |= changes
    return ranges.unify(arguments.pop("models"), arguments.pop("base"), out, **arguments)


REFUSED: dict[str, tuple[Callable[[StateRange], Any], type[Exception], str]] = {
    "larger memory": (lambda s: unify_once(StateRange.empty([2000], 2, F32)), ValueError, "2048"),
    "fewer planes": (
        lambda s: unify_once(StateRange(s.u, s.planes[:1])),
        ValueError,
        r"1 planes.* 2 tasks",
    ),
    "another size": (lambda s: unify_once(s, base=[torch.zeros(599)]), ValueError, r"599.*600"),
    "strided": (
        lambda s: unify_once(s, base=[torch.zeros(1200)[::2]]),
        ValueError,
        r"contiguous.*\(2,\)",
    ),
    "float64": (lambda s: unify_once(s, base=[torch.zeros(600).double()]), TypeError, "float64"),
    "state in fp16": (
        lambda s: unify_once(StateRange(s.u.half(), s.planes)),
        TypeError,
        "float16",
    ),
    "absorb into another dtype": (
        lambda s: ranges.absorb(
            StateRange(s.u, s.planes[:1]),
            torch.ones(1, 1),
            [torch.ones(600)],
            None,
            StateRange(s.u.bfloat16(), s.planes),
            rule=RULES[0],
        ),
        ValueError,
        r"float32.*bfloat16",
    ),
    "merge of two dtypes": (
        lambda s: ranges.merge(
            StateRange(s.u, s.planes[:1]),
            torch.ones(1, 1),
            StateRange(s.u.bfloat16(), s.planes[1:]),
            torch.ones(1, 1),
            [600],
            s,
            rule=RULES[0],
        ),
        ValueError,
        r"float32.*bfloat16",
    ),
    "rescalers of other tensors": (
        lambda s: ranges.decouple(
            StateRange(s.u, s.planes[:1]), torch.ones(2), None, [torch.ones(600)]
        ),
        ValueError,
        r"\(2,\).*\(1, 1\)",
    ),
}


@pytest.mark.parametrize("case", list(REFUSED))
def test_refused_before_anything_is_written(case: str) -> None:
    call, error, words = REFUSED[case]
    memory = StateRange.empty([600], 2, F32)
    memory.u.fill_(5)
    for plane in memory.planes:
        plane.fill_(5)
    with pytest.raises(error, match=words):
        call(memory)
    assert bool((memory.u == 5).all())
    assert all(bool((plane == 5).all()) for plane in memory.planes)


# ---- on a GPU ------------------------------------------------------------------------------------


def test_copies_to_and_fro(monkeypatch: pytest.MonkeyPatch) -> None:
    """The way over a GPU, with the CPU in its place; every call waits for its stream."""
    calls: list[str] = []

    class Stream:
        def synchronize(self) -> None:
            calls.append("waited")

    def elsewhere(_: object) -> ranges._Elsewhere:
        calls.append("called")
        return ranges._Elsewhere(torch.device("cpu"))

    monkeypatch.setattr(ranges, "_elsewhere", elsewhere)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda _: Stream())
    case = make_case((65536 + 9, 300), 3, "mixed")
    assert_same(run(InRanges(0), case), run(_ops, case))
    assert calls == ["called", "waited"] * (len(calls) // 2)


@pytest.mark.gpu
def test_on_a_gpu() -> None:
    """Several workers, each with a stream of its own."""
    case = make_case(SIZES, 3, "mixed")
    expected = run(InRanges(0), case)
    found: dict[int, dict[str, Tensor]] = {}

    def work(seed: int) -> None:
        with torch.cuda.stream(torch.cuda.Stream()):
            found[seed] = run(InRanges(seed, device=torch.device("cuda")), case)

    beside_one_another(work, workers=3)
    for results in found.values():
        for name, value in results.items():
            if ".sums" in name:
                torch.testing.assert_close(value, expected[name], rtol=1e-7, atol=0)
            else:
                assert same_bytes(value, expected[name]), name
