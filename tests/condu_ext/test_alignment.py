"""magnitude_threshold, align_, average_: values, against NumPy."""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from adapters import (
    Adapter,
    adapter,
    average_of,
    awkward,
    computed,
    conflicts_of,
    copy_of,
    threshold_of,
    wide,
)
from hypothesis import given
from hypothesis import strategies as st
from kernel_cases import (
    BF16,
    DTYPES,
    EDGES,
    F16,
    F32,
    SMALL,
    digests,
    needs_memory,
    same_bytes,
)
from test_instruction_sets import flushed_denormals, rounding_up
from torch import Tensor

import condu_ext as cx

BACKENDS = [None, "reference"]
ALL = [F32, BF16, F16]
PAIRS = list(itertools.product(ALL, ALL))
TOPS = [(0.5, 1, 2), (0.1, 1, 10), (0.9, 9, 10), (1.0, 1, 1), (1e-9, 1, 10**9)]  # top, as p / q


def rank(numel: int, p: int, q: int) -> int:
    return -(-numel * p // q)


def only(values: list[float], dtype: torch.dtype = F32) -> Adapter:
    return {"x": torch.tensor(values, dtype=dtype)}


# ---- magnitude_threshold -------------------------------------------------------------------------


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", DTYPES)
@pytest.mark.parametrize(("top", "p", "q"), TOPS)
def test_threshold_of_each_tensor(
    top: float, p: int, q: int, kind: str, backend: str | None
) -> None:
    sizes = [n for n in (*SMALL, *EDGES) if n]
    g = adapter(sizes, kind)
    found = cx.magnitude_threshold(g, top, backend=backend)
    assert list(found) == list(g)
    for name, tensor in g.items():
        assert found[name].dtype == F32
        assert found[name].shape == ()
        assert found[name].item() == threshold_of(wide(tensor), rank(tensor.numel(), p, q)), name


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", DTYPES)
@pytest.mark.parametrize(("top", "p", "q"), TOPS)
def test_threshold_over_all_tensors(
    top: float, p: int, q: int, kind: str, backend: str | None
) -> None:
    """One value, in fp32, also where dtypes are mixed and tensors are empty."""
    g = adapter([*EDGES, *SMALL], kind, seed=1)
    together = np.concatenate([wide(t) for t in g.values()])
    found = cx.magnitude_threshold(g, top, "global", backend=backend)
    expected = threshold_of(together, rank(len(together), p, q))
    assert [t.item() for t in found.values()] == [expected] * len(g)
    assert list(found) == list(g)


def test_large_tensors_beside_small_ones() -> None:
    """Threads share a large tensor, and take small ones each."""
    g = adapter([300_000, 3, 262_144, 262_143, 9], "mixed", seed=2)
    torch.set_num_threads(2)
    for name, found in cx.magnitude_threshold(g, 0.25).items():
        assert found.item() == threshold_of(wide(g[name]), rank(g[name].numel(), 1, 4))


@pytest.mark.parametrize("dtype", [BF16, F16])
def test_every_value_of_a_16_bit_dtype(dtype: torch.dtype) -> None:
    every = torch.arange(65536, dtype=torch.int32).to(torch.int16).view(dtype)
    every = every[every.isfinite()]
    ordered = np.sort(np.abs(wide(every)))[::-1]
    ranks = [*range(1, 65, 3), *range(100, len(every), 997), len(every)]
    for k in ranks:
        found = torch.ops.condu.magnitude_threshold([every], [k])
        assert found.item() == ordered[k - 1], k


@pytest.mark.parametrize(
    ("top", "numel", "expected"),
    # In float64 .56 · 25 and .07 · 100 come out above the integer, and 1/3 · 3 at it.
    [(0.1, 30, 3), (0.56, 25, 14), (0.07, 100, 7), (0.5, 7, 4), (1 / 3, 3, 1), (1e-30, 5, 1)],
)
def test_the_share_is_a_decimal_number(top: float, numel: int, expected: int) -> None:
    g = {"x": torch.arange(1.0, numel + 1)}
    for scope in ("tensor", "global"):
        assert cx.magnitude_threshold(g, top, scope)["x"].item() == numel + 1 - expected


@pytest.mark.parametrize(
    ("top", "expected"),
    # Converted to float64, numpy.float32(0.1) · 30 comes out above 3.
    [
        (np.float32(0.1), 3),
        (np.float16(0.7), 21),
        (np.float64(0.1), 3),
        (np.float32(1e-8), 1),
        (Fraction(1, 10), 3),
        (1, 30),
        (np.int64(1), 30),
    ],
)
def test_the_share_is_the_number_that_it_prints_as(top: Any, expected: int) -> None:
    """Whatever its type is."""
    g = {"x": torch.arange(1.0, 31.0)}
    for scope in ("tensor", "global"):
        assert cx.magnitude_threshold(g, top, scope)["x"].item() == 31 - expected


def test_ties_zeros_and_subnormals() -> None:
    tiny = 2.0**-149
    g = {
        "equal": torch.tensor([3.0, -3.0] * 500),
        "zeros": torch.tensor([0.0, -0.0] * 500),
        "tiny": torch.tensor([tiny, -2 * tiny, 0.0, -0.0]),
        "one": torch.tensor([-7.0]),
    }
    found = cx.magnitude_threshold(g)
    assert {name: t.item() for name, t in found.items()} == {
        "equal": 3.0,
        "zeros": 0.0,
        "tiny": tiny,
        "one": 7.0,
    }
    assert not found["zeros"].signbit()


@pytest.mark.parametrize("backend", BACKENDS)
def test_empty_tensors(backend: str | None) -> None:
    """Nothing reaches the threshold of no elements."""
    g = {"none": torch.zeros(0, 3), "x": torch.tensor([2.0, 1.0])}
    found = cx.magnitude_threshold(g, backend=backend)
    assert (found["none"].item(), found["x"].item()) == (np.inf, 2.0)
    over_all = cx.magnitude_threshold(g, 1.0, "global", backend=backend)
    assert [t.item() for t in over_all.values()] == [1.0, 1.0]
    empty = {"none": torch.zeros(0)}
    for scope in ("tensor", "global"):
        assert cx.magnitude_threshold(empty, 1.0, scope, backend=backend)["none"].item() == np.inf
    w = {"none": torch.zeros(0)}
    assert cx.align_(w, empty, cx.magnitude_threshold(empty), backend=backend).item() == 0.0
    cx.average_(w, empty, backend=backend)


@given(
    values=st.lists(
        st.one_of(
            st.sampled_from([0.0, -0.0, 1.0, -1.0, 0.5, 2.0**-149, -(2.0**-130)]),
            st.floats(width=32, allow_nan=False, allow_infinity=False),
        ),
        min_size=1,
        max_size=60,
    ),
    top=st.floats(0.0, 1.0, exclude_min=True),
)
def test_share_of_the_elements_that_reach_the_threshold(values: list[float], top: float) -> None:
    least = -(-Fraction(repr(top)) * len(values) // 1)
    magnitudes = np.abs(np.array(values))
    found = cx.magnitude_threshold(only(values), top)["x"].item()
    assert (magnitudes >= found).sum() >= least
    assert (magnitudes > found).sum() < least


def test_results_may_be_changed_and_saved_one_by_one() -> None:
    found = cx.magnitude_threshold(adapter([10, 20], "fp32"), scope="global")
    before = found["t1"].item()
    found["t0"].fill_(-1)
    assert found["t1"].item() == before
    assert found["t0"].untyped_storage().data_ptr() != found["t1"].untyped_storage().data_ptr()


# ---- align_ --------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("to", ["zero", "global"])
@pytest.mark.parametrize(("g_dtype", "w_dtype"), PAIRS)
def test_alignment(
    g_dtype: torch.dtype, w_dtype: torch.dtype, to: Any, backend: str | None
) -> None:
    sizes = [*SMALL, *EDGES]
    g, w = adapter(sizes, [g_dtype], 3), adapter(sizes, [w_dtype], 4)
    before = copy_of(w)
    threshold = cx.magnitude_threshold(g, 0.4)
    fraction = cx.align_(w, g, threshold, to, backend=backend)
    count = 0
    for name, tensor in w.items():
        conflict = torch.from_numpy(
            conflicts_of(wide(before[name]), wide(g[name]), threshold[name].item())
        )
        replacement = g[name].to(w_dtype) if to == "global" else torch.zeros((), dtype=w_dtype)
        assert same_bytes(tensor, torch.where(conflict, replacement, before[name])), name
        count += int(conflict.sum())
    assert fraction.dtype == torch.float64
    assert fraction.shape == ()
    assert fraction.item() == count / sum(sizes)
    assert 0.1 < fraction.item() < 0.4


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", ALL)
def test_signs_not_the_product(dtype: torch.dtype, backend: str | None) -> None:
    """Products that underflow conflict; zeros of either sign and NaN do not."""
    tiny = torch.finfo(dtype).smallest_normal / 4
    cases = [  # g, w, what w becomes
        (tiny, -tiny, 0.0), (-tiny, tiny, 0.0), (tiny, tiny, tiny), (0.0, -1.0, -1.0),
        (-0.0, 1.0, 1.0), (1.0, -0.0, -0.0), (-1.0, 0.0, 0.0), (torch.nan, -1.0, -1.0),
        (1.0, -torch.nan, -torch.nan), (-1.0, torch.nan, torch.nan),
        (torch.inf, -torch.inf, 0.0), (1.0, -torch.inf, 0.0),
    ]  # fmt: skip
    g, w, expected = (only([case[k] for case in cases], dtype) for k in range(3))
    zero = {"x": torch.tensor(0.0)}
    fraction = cx.align_(w, g, zero, backend=backend)
    np.testing.assert_array_equal(wide(w["x"]), wide(expected["x"]))
    finite = ~expected["x"].isnan()
    assert torch.equal(w["x"].signbit()[finite], expected["x"].signbit()[finite])
    assert fraction.item() == 4 / len(cases)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", ALL)
def test_edge_of_the_threshold(dtype: torch.dtype, backend: str | None) -> None:
    """|g| ≥ τ is judged in fp32, also where τ lies between two values of g's dtype."""
    g = only([1.0, -1.0, 2.0], dtype)
    above = float(np.nextafter(np.float32(1.0), np.float32(2.0)))
    for limit, expected in [
        (1.0, [0.0, 0.0, 0.0]),
        (above, [-5.0, 5.0, 0.0]),
        (2.0, [-5.0, 5.0, 0.0]),
        (-1.0, [0.0, 0.0, 0.0]),
        (torch.inf, [-5.0, 5.0, -5.0]),
        (torch.nan, [-5.0, 5.0, -5.0]),
    ]:
        w = only([-5.0, 5.0, -5.0], dtype)
        cx.align_(w, g, {"x": torch.tensor(limit)}, backend=backend)
        assert w["x"].tolist() == expected, limit


def test_global_values_are_rounded_once() -> None:
    """fp32 → fp16 and bf16: ties to even, subnormals, overflow."""
    values = [1 + 2**-11, 1 + 3 * 2**-11, 2**-25, 3 * 2**-26, 1e6, 1 + 2**-8, 2**-134]
    for dtype in (F16, BF16):
        g = only(values)
        w = {"x": -torch.ones(len(values), dtype=dtype)}
        cx.align_(w, g, {"x": torch.tensor(0.0)}, "global")
        assert same_bytes(w["x"], g["x"].to(dtype))


@given(seed=st.integers(0, 2**31), to=st.sampled_from(["zero", "global"]), k=st.integers(1, 600))
def test_aligned_weights_have_no_conflict(seed: int, to: Any, k: int) -> None:
    g, w = adapter([k, 7], "mixed", seed), adapter([k, 7], "mixed", seed + 1)
    threshold = cx.magnitude_threshold(g, 0.5, "global")
    cx.align_(w, g, threshold, to)
    once = copy_of(w)
    for name in w:
        assert not conflicts_of(wide(w[name]), wide(g[name]), threshold[name].item()).any()
    assert cx.align_(w, g, threshold, to).item() == 0.0
    assert all(same_bytes(w[name], once[name]) for name in w)


def test_the_reference_is_only_read() -> None:
    g, w = adapter([70000, 3], "mixed", 1), adapter([70000, 3], "mixed", 2)
    before, threshold = copy_of(g), cx.magnitude_threshold(g)
    limits = copy_of(threshold)
    cx.align_(w, g, threshold, "global")
    assert all(same_bytes(g[name], before[name]) for name in g)
    assert all(same_bytes(threshold[name], limits[name]) for name in g)


# ---- average_ ------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("weight", [0.5, 0.0, 1.0, 2 / 3, 0.3, 1e-20])
@pytest.mark.parametrize(("g_dtype", "w_dtype"), PAIRS)
def test_average(
    g_dtype: torch.dtype, w_dtype: torch.dtype, weight: float, backend: str | None
) -> None:
    sizes = [*SMALL, *EDGES]
    g, w = adapter(sizes, [g_dtype], 5), adapter(sizes, [w_dtype], 6)
    before, kept = copy_of(g), copy_of(w)
    cx.average_(g, w, weight, check=False, backend=backend)
    for name in g:
        assert same_bytes(g[name], average_of(before[name], w[name], weight)), name
        assert same_bytes(w[name], kept[name])
        if g_dtype == w_dtype:
            exact = weight * wide(before[name]) + (1 - weight) * wide(w[name])
            scale = np.abs(wide(before[name])) + np.abs(wide(w[name])) + torch.finfo(g_dtype).tiny
            error = np.abs(wide(g[name]) - exact) / scale
            assert error.max(initial=0) <= torch.finfo(g_dtype).eps


def test_average_has_no_fused_multiply_add() -> None:
    """The data tell both apart."""
    generator = torch.Generator().manual_seed(0)
    g, w = (torch.randn(5000, generator=generator) for _ in range(2))
    a, b = np.float32(0.3), np.float32(0.7)
    rounded = torch.from_numpy(b * w.numpy()).double()
    fused = (g.double() * float(a) + rounded).float()
    expected = average_of(g, w, 0.3)
    assert not torch.equal(fused, expected)
    cx.average_({"x": g}, {"x": w}, 0.3)
    assert same_bytes(g, expected)


def test_weight_of_the_running_mean() -> None:
    adapters = [torch.randn(100, generator=torch.Generator().manual_seed(k)) for k in range(5)]
    g = {"x": adapters[0].clone()}
    for t, w in enumerate(adapters[1:], start=2):
        cx.average_(g, {"x": w}, 1 - 1 / t)
    torch.testing.assert_close(g["x"], torch.stack(adapters).mean(0))


def test_default_weight_is_one_half() -> None:
    g = only([1.0, -2.0])
    cx.average_(g, only([3.0, 2.0]))
    assert g["x"].tolist() == [2.0, 0.0]


# ---- values that are not finite ------------------------------------------------------------------


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("value", [torch.nan, -torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("dtype", ALL)
def test_not_finite(dtype: torch.dtype, value: float, backend: str | None) -> None:
    good, bad = adapter([9, 70000], [dtype], 1), adapter([9, 70000], [dtype], 2)
    bad["t1"][-1] = value
    for scope in ("tensor", "global"):
        with pytest.raises(ValueError, match=r"reference, tensor 't1'.*NaN or infinite"):
            cx.magnitude_threshold(bad, 0.1, scope, backend=backend)
    before = copy_of(good)
    with pytest.raises(ValueError, match=r"current, tensor 't1'.*NaN or infinite"):
        cx.average_(good, bad, backend=backend)
    assert all(same_bytes(good[name], before[name]) for name in good)
    before = copy_of(bad)
    with pytest.raises(ValueError, match=r"reference, tensor 't1'.*NaN or infinite"):
        cx.average_(bad, good, backend=backend)
    assert all(same_bytes(bad[name], before[name]) for name in bad)
    cx.average_(good, bad, check=False, backend=backend)
    assert int((~good["t1"].isfinite()).sum()) == 1
    assert good["t0"].isfinite().all()


def test_largest_values_are_finite() -> None:
    """Their sums are not, which is no reason to refuse them."""
    g = {"x": torch.full((5000,), torch.finfo(F32).max)}
    cx.average_(g, copy_of(g), 0.5)
    assert (g["x"] == torch.finfo(F32).max).all()
    assert cx.magnitude_threshold(g)["x"].item() == torch.finfo(F32).max


# ---- the same bits everywhere --------------------------------------------------------------------


@pytest.fixture(scope="module")
def expected() -> dict[str, str]:
    return digests(computed())


@pytest.mark.parametrize("threads", [2, 3, 16])
def test_threads_do_not_matter(threads: int, expected: dict[str, str]) -> None:
    torch.set_num_threads(threads)
    assert digests(computed()) == expected


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("mode", [flushed_denormals, rounding_up])
def test_modes_of_the_process_do_not_matter(
    mode: Any, threads: int, expected: dict[str, str]
) -> None:
    torch.set_num_threads(threads)
    generator = torch.Generator().manual_seed(0)
    sizes = (70000, 65)
    g, w = ([awkward(n, F32, generator) * 2.0**-130 for n in sizes] for _ in range(2))
    limits = torch.tensor([2.0**-135, 2.0**-149])
    results = []
    for inside in (False, True):
        gs, ws = [t.clone() for t in g], [t.clone() for t in w]
        if inside:
            with mode():
                found = _all_operators(ws, gs, limits)
        else:
            found = _all_operators(ws, gs, limits)
        results.append([*found, *ws, *gs])
    for a, b in zip(*results, strict=True):
        assert same_bytes(a, b)
    assert int((results[0][-2] != 0).sum()) > 0
    assert float(results[0][-2].abs().double().min()) < 2.0**-126


def _all_operators(w: list[Tensor], g: list[Tensor], limits: Tensor) -> list[Tensor]:
    ops = torch.ops.condu
    found = ops.magnitude_threshold(g, [t.numel() // 2 for t in g])
    half = [t.to(BF16) for t in w]
    changed = [ops.align_(w, g, limits, False), ops.align_(half, g, limits, True)]
    ops.average_(g, w, 0.3)
    return [found, *changed, *half]


@pytest.mark.parametrize("isa", ["avx512", "avx2", "baseline"])
def test_instruction_sets_do_not_matter(isa: str, expected: dict[str, str]) -> None:
    probe = Path(__file__).with_name("adapters.py")
    environment = os.environ | {
        "CONDU_CPU_ISA": isa,
        "PYTHONPATH": os.pathsep.join(p for p in sys.path if p),
        "OMP_NUM_THREADS": "1",
    }
    run = subprocess.run(
        [sys.executable, str(probe)], env=environment, capture_output=True, text=True
    )
    if run.returncode and "names no instruction set of this machine" in run.stderr:
        pytest.skip(f"this machine has no {isa}")
    assert run.returncode == 0, run.stderr
    found = json.loads(run.stdout)
    assert found["isa"] == isa
    assert found["digests"] == expected


@pytest.mark.gpu
def test_a_gpu_gives_the_same_bits() -> None:
    sizes = [*SMALL, *EDGES]
    for kind, first in itertools.product(DTYPES, range(3)):
        g, w = adapter(sizes, kind, 1), adapter(sizes, kind, 2, first)
        there = [{n: t.cuda() for n, t in side.items()} for side in (g, w)]
        for scope, to in itertools.product(["tensor", "global"], ["zero", "global"]):
            limits = cx.magnitude_threshold(g, 0.4, scope)
            found = cx.magnitude_threshold(there[0], 0.4, scope)
            assert all(same_bytes(found[n].cpu(), limits[n]) for n in g)
            here, moved = copy_of(w), copy_of(there[1])
            fraction = cx.align_(moved, there[0], found, to)
            assert fraction.is_cuda
            assert fraction.item() == cx.align_(here, g, limits, to).item()
            assert all(same_bytes(moved[n].cpu(), here[n]) for n in g)
        cx.average_(g, w, 0.3)
        cx.average_(there[0], there[1], 0.3)
        assert all(same_bytes(there[0][n].cpu(), g[n]) for n in g)


@pytest.mark.slow
def test_past_two_to_the_31() -> None:
    """9 GiB: the strongest weights and the conflicts lie beyond 32-bit offsets."""
    needs_memory(10 << 30)
    numel = 2**31 + 2**16 + 5
    g, w = (torch.ones(numel, dtype=BF16) for _ in range(2))
    g[-9:] = 5.0
    w[-4:] = -1.0
    assert torch.ops.condu.magnitude_threshold([g], [9]).item() == 5.0
    assert torch.ops.condu.magnitude_threshold([g], [10]).item() == 1.0
    assert torch.ops.condu.align_([w], [g], torch.tensor([2.0]), True).item() == 4
    assert (w[-4:] == 5.0).all()
    torch.ops.condu.average_([g], [w], 0.5)
    assert g[-10:].tolist() == [1.0, *[3.0] * 5, *[5.0] * 4]
