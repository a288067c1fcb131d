"""Every operator on the CPU against the reference in plain PyTorch.

Unified deltas, planes (padding included) and decoupled weights are compared as bytes; sums, which
the reference forms in fp64, to 1e-7.
"""

from __future__ import annotations

import pytest
import torch
from kernel_cases import (
    BF16,
    DTYPES,
    EDGES,
    F16,
    F32,
    SMALL,
    Case,
    differing,
    make_case,
    run,
    same_bytes,
)
from torch import Tensor

from condu_ext import _ops, reference

pytestmark = pytest.mark.usefixtures("poisoned")


def relative_error(sums: Tensor, exact: Tensor) -> float:
    """Largest |a - b| / |b|; where b is 0, a must be 0 as well."""
    error = (sums - exact).abs()
    return float(torch.where(error == 0, 0.0, error / exact.abs()).max()) if error.numel() else 0.0


def check(case: Case, tolerance: float = 1e-7) -> None:
    got, expected = run(_ops, case), run(reference, case)
    assert list(got) == list(expected)
    for name, value in got.items():
        if ".sums" in name:
            assert value.dtype == torch.float64
            assert value.shape == expected[name].shape
            assert relative_error(value, expected[name]) <= tolerance, name
        else:
            assert same_bytes(value, expected[name]), f"{name}: {differing(value, expected[name])}"


@pytest.mark.parametrize("tasks", [*range(1, 21), 64])
def test_number_of_tasks(tasks: int) -> None:
    state = BF16 if tasks % 2 else F32
    check(make_case(SMALL if tasks < 20 else (17, 300), tasks, "mixed", state, tasks % 3, tasks))


@pytest.mark.parametrize("zero_sum", [0, 1, 2])
@pytest.mark.parametrize("state", [F32, BF16])
@pytest.mark.parametrize("kind", list(DTYPES))
def test_dtypes_and_rules(kind: str, state: torch.dtype, zero_sum: int) -> None:
    check(make_case(SMALL, 3, kind, state, zero_sum, seed=zero_sum))


@pytest.mark.parametrize(("kind", "state", "tasks"), [("fp32", F32, 2), ("mixed", BF16, 5)])
def test_sizes_around_blocks_and_chunks(kind: str, state: torch.dtype, tasks: int) -> None:
    check(make_case(EDGES, tasks, kind, state, zero_sum=1))


@pytest.mark.parametrize("kind", list(DTYPES))
def test_misaligned_inputs_among_nan(kind: str) -> None:
    """Views that start one element into a buffer of NaN: nothing outside them may count."""

    def place(tensor: Tensor) -> Tensor:
        buffer = torch.full((tensor.numel() + 66,), torch.nan, dtype=tensor.dtype)
        buffer[1 : tensor.numel() + 1] = tensor
        return buffer[1 : tensor.numel() + 1]

    check(make_case(SMALL, 3, kind, place=place))


@pytest.mark.parametrize("tasks", [1, 6])
def test_sums_that_leave_the_range(tasks: int) -> None:
    """Finite deltas whose total is ±infinity still elect a sign; fp32 sums may then overflow."""
    case = make_case((33, 700), tasks, "fp32", zero_sum=2)
    largest = torch.finfo(F32).max
    for t, model in enumerate(case.models):
        for k, tensor in enumerate(model):
            tensor.mul_(largest / 8)
            tensor[5::11] = largest if (t + k) % 3 else -largest
    for tensor in case.base:
        tensor.zero_()
    got, expected = run(_ops, case), run(reference, case)
    for name, value in got.items():
        if ".sums" not in name:
            assert same_bytes(value, expected[name]), f"{name}: {differing(value, expected[name])}"


@pytest.mark.parametrize("zero_sum", [0, 1, 2])
@pytest.mark.parametrize("state", [F32, BF16])
def test_any_incoming_state(state: torch.dtype, zero_sum: int) -> None:
    """Bits and values that no unify would give: set bits where u is 0, rescalers of 0."""
    numels, tasks = [1, 100, 513], 11
    generator = torch.Generator().manual_seed(1)
    case = make_case(numels, tasks, "mixed", state, zero_sum)
    size = 512 + 512 + 1024

    def arena() -> tuple[Tensor, list[Tensor]]:
        u = torch.randint(-4, 5, (size,), generator=generator) / 64
        planes = [
            torch.randint(0, 256, (size // 8,), generator=generator, dtype=torch.uint8)
            for _ in range(tasks)
        ]
        for start, end in ((1, 512), (612, 1024), (1537, 2048)):  # padding is zero in any state
            u[start:end] = 0
            for plane in planes:
                bits = reference.unpack_bits(plane, size)
                bits[start:end] = False
                plane.copy_(reference.pack_bits(bits))
        return u.to(state), planes

    a, planes_a = arena()
    b, planes_b = arena()
    lam = case.rescalers[:tasks].clone()
    lam[::3, 1] = 0.0
    absorbed = [
        ops.absorb(a, planes_a, lam, case.models[0], case.base, zero_sum, [])
        for ops in (_ops, reference)
    ]
    merged = [
        ops.merge(a, planes_a, lam, b, planes_b, lam.flip(0), numels, zero_sum)
        for ops in (_ops, reference)
    ]
    for got, expected in (absorbed, merged):
        assert same_bytes(got[0], expected[0]), differing(got[0], expected[0])
        assert all(same_bytes(*pair) for pair in zip(got[1], expected[1], strict=True))
        assert relative_error(got[2], expected[2]) <= 1e-7


# Codes: 0 none, 1 through bfloat16, 2 through float16.
@pytest.mark.parametrize(
    ("kind", "codes"),
    [("fp32", [1]), ("fp32", [2]), ("bf16", [2]), ("fp16", [1]), ("fp32", [0, 1, 2])],
)
@pytest.mark.parametrize("size", ["small", "edges"])
def test_rounding_of_the_base(kind: str, codes: list[int], size: str) -> None:
    case = make_case(SMALL if size == "small" else (1025, 65537), 2, kind)
    case.via = [codes[k % len(codes)] for k in range(len(case.numels))]
    narrow = [DTYPES[kind][0], BF16, F16]
    case.models = [
        [t.to(narrow[case.via[k]]) for k, t in enumerate(model)] for model in case.models
    ]
    check(case)


def test_rounding_of_the_base_rounds() -> None:
    """An untouched fine-tune of the rounded base has no delta at all; of the base itself, many."""
    base = [torch.randn(1000)]
    model = [base[0].to(BF16)]
    u, planes, sums = _ops.unify(model, base, 1, 0, F32, [1])
    assert not u.any()
    assert not planes[0].any()
    assert not sums.any()
    assert _ops.unify(model, base, 1, 0, F32, [])[2].min() > 0


def test_tensors_without_elements() -> None:
    case = make_case((0, 0), 2, "fp32")
    check(case)
    assert run(_ops, case)["unify.sums[0]"].shape == (4, 0)


def test_sums_are_keyed_by_chunk() -> None:
    """A tensor's sums do not depend on its neighbours or on its place in the list."""
    case = make_case((70000, 3, 131073), 2, "bf16")
    order = [2, 0, 1]
    models = [[model[k] for k in order] for model in case.models[:2]]
    columns = {0: [0, 1], 1: [2], 2: [3, 4, 5]}
    sums = run(_ops, case)["unify.sums[0]"]
    flat = [t for model in models for t in model]
    moved = _ops.unify(flat, [case.base[k] for k in order], 2, 0, F32, [])[2]
    assert torch.equal(moved, sums[:, [c for k in order for c in columns[k]]])


def test_large_sums_keep_their_precision() -> None:
    """One fp32 accumulator over these would stop growing long before the end."""
    model = [torch.rand(3_000_001, generator=torch.Generator().manual_seed(0))]
    exact = model[0].sum(dtype=torch.float64)
    assert relative_error(_ops.measure(model, [], []).sum(), exact) <= 1e-8


@pytest.mark.parametrize("value", [0.1, 0.7, 1e-5, 1 / 3, 1.1])
def test_sums_of_equal_values(value: float) -> None:
    """Roundings that all go the same way, as after a step of size lr in every parameter."""
    model = [torch.full((65536,), value)]
    exact = model[0].sum(dtype=torch.float64)
    assert relative_error(_ops.measure(model, [], []).sum(), exact) <= 1e-7


def test_the_worst_a_step_can_do_to_a_sum() -> None:
    """Two fp32 additions a term, (a + b) + (c + d), each half an ulp off, before fp64."""
    values = torch.tensor([1.0, 2.0**-24, 2.0**-25, 2.0**-25]).repeat_interleave(16).repeat(16)
    exact = values.sum(dtype=torch.float64)
    assert relative_error(_ops.measure([values], [], []).sum(), exact) <= 2.0**-23


def test_a_one_task_state_has_equal_sums() -> None:
    """What makes λ exactly 1: numerator and denominator add the same numbers in the same order."""
    case = make_case(SMALL + EDGES, 1, "fp32")
    sums = _ops.unify(case.models[0], case.base, 1, 0, F32, [])[2]
    assert torch.equal(sums[0], sums[1])
