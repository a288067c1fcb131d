"""The CUDA kernels, emulated on the CPU, against the reference in plain PyTorch.

Unified deltas, planes (padding included), decoupled weights and the memory round them are compared
as bytes; sums to 1e-7. Every case runs with the threads and blocks in both orders, which must not
make a difference: a race between threads would.
"""

from __future__ import annotations

from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from emulated_cuda import use
from kernel_cases import (
    BF16,
    DTYPES,
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

from condu_ext import _cuda, _dispatch, _ops, _tables, reference

pytestmark = pytest.mark.usefixtures("poisoned")
# Tensors that typed kernels take (whole groups of eight), round tiles' and warps' borders.
WHOLE = (8, 16, 248, 256, 264, 504, 512, 520, 2048, 2056, 8184, 8192, 8200)


def relative_error(sums: Tensor, exact: Tensor) -> float:
    error = (sums - exact).abs()
    return float(torch.where(error == 0, 0.0, error / exact.abs()).max()) if error.numel() else 0.0


def check(emulated: Any, emulator: ModuleType, case: Case, tolerance: float = 1e-7) -> None:
    expected = run(reference, case)
    emulator.reverse(False)
    forwards = run(emulated, case)
    emulator.reverse(True)
    backwards = run(emulated, case)
    assert list(forwards) == list(expected)
    for name, value in forwards.items():
        assert same_bytes(value, backwards[name]), f"{name} depends on the order of threads"
        if ".sums" in name:
            assert value.dtype == torch.float64
            assert value.shape == expected[name].shape
            assert relative_error(value, expected[name]) <= tolerance, name
        else:
            assert same_bytes(value, expected[name]), f"{name}: {differing(value, expected[name])}"


@pytest.mark.parametrize("tasks", [*range(1, 10), 15, 16, 17, 20, 33, 64])
@pytest.mark.parametrize("kind", list(DTYPES))
def test_number_of_tasks(emulated: Any, emulator: ModuleType, kind: str, tasks: int) -> None:
    state = BF16 if tasks % 2 else F32
    check(emulated, emulator, make_case((17, 264, 1024), tasks, kind, state, tasks % 3, tasks))


@pytest.mark.parametrize("zero_sum", [0, 1, 2])
@pytest.mark.parametrize("state", [F32, BF16])
@pytest.mark.parametrize("kind", list(DTYPES))
def test_dtypes_and_rules(
    emulated: Any, emulator: ModuleType, kind: str, state: torch.dtype, zero_sum: int
) -> None:
    check(emulated, emulator, make_case(SMALL, 3, kind, state, zero_sum, seed=zero_sum))


@pytest.mark.parametrize(("kind", "state", "tasks"), [("fp32", BF16, 2), ("bf16", F32, 9)])
def test_sizes_around_warps_and_tiles(
    emulated: Any, emulator: ModuleType, kind: str, state: torch.dtype, tasks: int
) -> None:
    check(emulated, emulator, make_case(WHOLE, tasks, kind, state, zero_sum=2))


@pytest.mark.parametrize(("kind", "state"), [("fp32", F32), ("mixed", BF16)])
def test_sizes_around_chunks(
    emulated: Any, emulator: ModuleType, kind: str, state: torch.dtype
) -> None:
    check(emulated, emulator, make_case((65535, 0, 65536, 65544, 1), 1, kind, state, zero_sum=1))


@pytest.mark.parametrize("shift", [1, 2, 4])
@pytest.mark.parametrize("kind", list(DTYPES))
def test_misaligned_inputs_among_nan(
    emulated: Any, emulator: ModuleType, kind: str, shift: int
) -> None:
    """Views that start inside a buffer of NaN: nothing outside them may count."""

    def place(tensor: Tensor) -> Tensor:
        buffer = torch.full((tensor.numel() + 66,), torch.nan, dtype=tensor.dtype)
        buffer[shift : tensor.numel() + shift] = tensor
        return buffer[shift : tensor.numel() + shift]

    check(emulated, emulator, make_case((0, 5, 8, 257, 520), 3, kind, place=place))


# Codes: 0 none, 1 through bfloat16, 2 through float16.
@pytest.mark.parametrize(
    ("kind", "codes"),
    [("fp32", [1]), ("fp32", [2]), ("bf16", [2]), ("fp16", [1]), ("fp32", [0, 1, 2])],
)
def test_rounding_of_the_base(
    emulated: Any, emulator: ModuleType, kind: str, codes: list[int]
) -> None:
    case = make_case((7, 264, 1025), 2, kind)
    case.via = [codes[k % len(codes)] for k in range(len(case.numels))]
    narrow = [DTYPES[kind][0], BF16, F16]
    case.models = [
        [t.to(narrow[case.via[k]]) for k, t in enumerate(model)] for model in case.models
    ]
    check(emulated, emulator, case)


@pytest.mark.parametrize("tasks", [1, 6, 17])
def test_sums_that_leave_the_range(emulated: Any, tasks: int) -> None:
    """Finite deltas whose total is ±infinity still elect a sign."""
    case = make_case((33, 704), tasks, "fp32", zero_sum=2)
    largest = torch.finfo(F32).max
    for t, model in enumerate(case.models):
        for k, tensor in enumerate(model):
            tensor.mul_(largest / 8)
            tensor[5::11] = largest if (t + k) % 3 else -largest
    for tensor in case.base:
        tensor.zero_()
    got, expected = run(emulated, case), run(reference, case)
    for name, value in got.items():
        if ".sums" not in name:
            assert same_bytes(value, expected[name]), f"{name}: {differing(value, expected[name])}"


@pytest.mark.parametrize("zero_sum", [0, 1, 2])
@pytest.mark.parametrize("state", [F32, BF16])
@pytest.mark.parametrize("tasks", [5, 11])
def test_any_incoming_state(emulated: Any, state: torch.dtype, zero_sum: int, tasks: int) -> None:
    """Bits and values that no unify would give: set bits where u is 0, rescalers of 0."""
    numels = [8, 104, 520]
    generator = torch.Generator().manual_seed(1)
    case = make_case(numels, tasks, "bf16", state, zero_sum)
    inside = torch.zeros(512 + 512 + 1024, dtype=torch.bool)
    for start, numel in zip((0, 512, 1024), numels, strict=True):
        inside[start : start + numel] = True

    def arena() -> tuple[Tensor, list[Tensor]]:
        u = torch.randint(-4, 5, inside.shape, generator=generator) / 64 * inside
        bits = torch.randint(0, 2, (tasks, *inside.shape), generator=generator).bool() & inside
        return u.to(state), [reference.pack_bits(row) for row in bits]

    a, b = arena(), arena()
    lam = case.rescalers[:tasks].clone()
    lam[::3, 1] = 0.0
    for name, args in (
        ("absorb", (*a, lam, case.models[0], case.base, zero_sum, [])),
        ("merge", (*a, lam, *b, lam.flip(0), numels, zero_sum)),
    ):
        got, expected = (getattr(module, name)(*args) for module in (emulated, reference))
        assert same_bytes(got[0], expected[0]), differing(got[0], expected[0])
        assert all(same_bytes(*pair) for pair in zip(got[1], expected[1], strict=True))
        assert relative_error(got[2], expected[2]) <= 1e-7


def test_values_that_are_not_finite_show_in_the_sums(emulated: Any) -> None:
    for value in (torch.nan, torch.inf, -torch.inf):
        for tasks in (1, 17):
            case = make_case((264, 1025), tasks, "fp32")
            case.models[0][1][1000] = value
            flat = [t for model in case.models[:tasks] for t in model]
            sums = emulated.unify(flat, case.base, tasks, 0, F32, [])[2]
            assert sums[0].isfinite().tolist() == [True, False]
            assert emulated.measure(case.models[0], case.base, []).isfinite().tolist() == [
                [True, False]
            ]


def test_a_one_task_state_has_equal_sums(emulated: Any) -> None:
    """What makes λ exactly 1: numerator and denominator add the same numbers in the same order."""
    case = make_case(SMALL + WHOLE, 1, "fp32")
    sums = emulated.unify(case.models[0], case.base, 1, 0, F32, [])[2]
    assert torch.equal(sums[0], sums[1])


@pytest.mark.parametrize("value", [0.1, 0.7, 1e-5, 1 / 3, 1.1])
def test_sums_of_equal_values(emulated: Any, value: float) -> None:
    model = [torch.full((65536,), value)]
    exact = model[0].sum(dtype=torch.float64)
    assert relative_error(emulated.measure(model, [], []).sum(), exact) <= 1e-7


def test_more_planes_than_one_launch_carries(emulated: Any) -> None:
    """Pointers to planes travel as kernel arguments, 480 at a time."""
    tasks = 500
    case = make_case((24,), tasks, "bf16")
    flat = [t for model in case.models[:tasks] for t in model]
    results = [module.unify(flat, case.base, tasks, 0, F32, []) for module in (emulated, reference)]
    assert same_bytes(results[0][0], results[1][0])
    assert all(same_bytes(*pair) for pair in zip(results[0][1], results[1][1], strict=True))


def test_more_tasks_than_a_block_has_shared_memory_for(emulated: Any) -> None:
    tasks = 3000
    planes = [torch.zeros(64, dtype=torch.uint8) for _ in range(tasks)]
    arguments = (torch.zeros(512), planes, torch.ones(tasks, 1), [torch.ones(9)], [], 0, [])
    with pytest.raises(RuntimeError, match="absorb on CUDA: too many tasks for this GPU's shared"):
        emulated.absorb(*arguments)


def test_arenas_that_are_not_aligned_are_refused(emulated: Any) -> None:
    buffer, plane = torch.zeros(513), torch.zeros(65, dtype=torch.uint8)
    for u, bits in ((buffer[1:], plane[:64]), (buffer[:512], plane[1:])):
        with pytest.raises(ValueError, match="16-byte boundary"):
            emulated.absorb(u, [bits], torch.ones(1, 1), [torch.ones(9)], [], 0, [])


def test_tables_say_what_a_chunk_has_in_common() -> None:
    numels = [65536 + 8, 65536 + 4, 16, 16, 16, 0]
    pointers = np.array([[4096, 4096, 4096, 4098, 4096, 0]] * 2, dtype=np.uint64)
    codes = np.array([[0, 1, 2, 0, 1, 0], [0, 1, 2, 0, 0, 0]], dtype=np.uint8)
    packed, kinds = _tables.pack(numels, pointers, codes)
    assert kinds == [2, 1, 1, 3]
    chunks = packed[: 7 * 32].view(_tables._CHUNK_DTYPE)
    assert chunks["id"].tolist() == [0, 1, 2, 4, 3, 5, 6]
    assert chunks["tensor"].tolist() == [0, 0, 1, 2, 1, 3, 4]
    assert chunks["start"].tolist() == [0, 65536, 0, 0, 65536, 0, 0]
    assert chunks["arena"].tolist() == [0, 65536, 66048, 132096, 131584, 132608, 133120]
    assert chunks["elements"].tolist() == [65536, 8, 65536, 16, 4, 16, 16]
    assert packed[7 * 32 : 7 * 32 + 96].view(np.uint64).tolist() == pointers.reshape(-1).tolist()
    assert packed[7 * 32 + 96 :].tolist() == codes.reshape(-1).tolist()


def test_tensors_without_memory_are_refused() -> None:
    pointers, codes = np.zeros((1, 1), dtype=np.uint64), np.zeros((1, 1), dtype=np.uint8)
    with pytest.raises(ValueError, match="memory"):
        _tables.pack([3], pointers, codes)


def test_tables_are_kept_and_forgotten(
    emulator: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A hit copies nothing, what a graph captured stays, and a capture copies nothing."""
    use(emulator, monkeypatch)
    copies: list[int] = []
    plain = _tables.upload
    monkeypatch.setattr(
        _tables, "upload", lambda packed, device: (copies.append(1), plain(packed, device))[1]
    )
    cache, cpu = _tables.TableCache(capacity=2), torch.device("cpu")

    def get(address: int, numel: int = 8, code: int = 0) -> _tables.Table:
        pointers = np.array([[address]], dtype=np.uint64)
        return cache.get(cpu, [numel], pointers, np.array([[code]], dtype=np.uint8))

    first = get(4096)
    assert get(4096) is first
    assert len(copies) == 1
    assert len({id(get(4096, 16)), id(get(4096, 8, 1)), id(get(8192))}) == 3
    assert len(cache) == 2
    assert get(4096) is not first  # pushed out by the others
    with monkeypatch.context() as capturing:
        capturing.setattr(_tables, "is_capturing", lambda device: True)
        kept = get(4096)
        with pytest.raises(RuntimeError, match="captured"):
            get(1 << 20)
    for k in range(4):
        get(1 << (20 + k))
    assert get(4096) is kept


@pytest.mark.parametrize(
    ("compiled", "capability", "covered"),
    [
        ("80,90", (8, 0), True),
        ("80,90", (8, 6), True),  # binaries run on later minors of their major
        ("86,90", (8, 0), False),
        ("80,86", (9, 0), True),  # by way of the last one's PTX
        ("90", (8, 9), False),
        ("80,90a", (9, 0), True),
        ("80,90a", (12, 0), False),  # neither binary nor PTX of 90a runs elsewhere
        ("80,100f", (10, 3), True),
        ("80,100f", (12, 0), False),
        ("80,120", (10, 0), False),
        ("", (9, 0), False),
    ],
)
def test_which_gpus_the_compiled_kernels_run_on(
    emulated: Any, compiled: str, capability: tuple[int, int], covered: bool
) -> None:
    assert emulated._covers(compiled, *capability) is covered


def test_misaligned_loads_are_noticed(emulator: ModuleType) -> None:
    """The emulator's own check, with a table that calls a misaligned tensor aligned."""
    table = np.zeros(64, dtype=np.uint8)
    buffer = torch.zeros(64)
    table[:32].view(_tables._CHUNK_DTYPE)["elements"] = 8
    table[32:40].view(np.uint64)[0] = buffer.data_ptr() + 4
    sums, space = torch.zeros(1, dtype=torch.float64), torch.zeros(8, dtype=torch.float64)
    work = emulator.Work(table.ctypes.data, 1, 1, [1, 0, 0, 0])
    with pytest.raises(RuntimeError, match="misaligned access of 16 bytes"):
        emulator.cuda_measure(emulator.Place(0, 0, space.data_ptr()), work, False, sums.data_ptr())


def test_a_failing_call_says_what_cuda_said(emulator: ModuleType) -> None:
    work = emulator.Work(0, 0, 0, [0, 0, 0, 0])
    with pytest.raises(RuntimeError, match="measure on CUDA: invalid device ordinal"):
        emulator.cuda_measure(emulator.Place(1, 0, 0), work, False, 0)


def test_which_back_end_a_gpu_gets(monkeypatch: pytest.MonkeyPatch) -> None:
    """Kernels where they run; plain PyTorch where they do not, unless kernels were asked for."""
    gpu = torch.device("cuda", 0)
    for compiled, runs, said in (("", True, "not at all"), ("90", False, "for 90")):
        monkeypatch.setattr(_dispatch._C, "cuda_archs", compiled)
        monkeypatch.setattr(_cuda, "runs_on", lambda device, runs=runs: runs)
        assert _dispatch.kernels_for(None, gpu) is reference
        with pytest.raises(RuntimeError, match=rf"cuda:0 \(compiled {said}\).*CONDU_CUDA=1"):
            _dispatch.kernels_for("cuda", gpu)
    monkeypatch.setattr(_cuda, "runs_on", lambda device: True)
    for backend in (None, "cuda"):
        assert _dispatch.kernels_for(backend, gpu) is _ops
    assert _dispatch.kernels_for("reference", gpu) is reference
    with pytest.raises(ValueError, match=r"'cpu'.*cuda:0"):
        _dispatch.kernels_for("cpu", gpu)
