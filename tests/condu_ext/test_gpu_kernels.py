"""The CUDA kernels on a GPU against the reference in plain PyTorch on the same CUDA tensors.

Unified deltas, planes and decoupled weights as bytes, chunk sums to 1e-7, rescalers to 4 ulp. What
does not need a GPU (tables, races, the emulated kernels) is in test_cuda_on_cpu.py.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

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

import condu_ext as cx
from condu_ext import _C, _cuda, _ops, reference

pytestmark = pytest.mark.gpu
ULP = 2.0**-23
OPS = torch.ops.condu


@pytest.fixture(autouse=True)
def kernels() -> None:
    if not _C.cuda_archs:
        pytest.skip("condu_ext was built without CUDA")
    if not _cuda.runs_on(torch.device("cuda", 0)):
        pytest.skip(f"no kernels for this GPU were compiled, only {_C.cuda_archs}")


def on(device: str, case: Case) -> Case:
    """The case with its tensors on a device, at the alignment that they had."""

    def move(tensor: Tensor) -> Tensor:
        shift = tensor.storage_offset()
        buffer = torch.full((tensor.numel() + shift,), torch.nan, dtype=tensor.dtype, device=device)
        buffer[shift:] = tensor
        return buffer[shift:]

    case.base = [move(t) for t in case.base]
    case.models = [[move(t) for t in model] for model in case.models]
    case.rescalers = case.rescalers.to(device)
    return case


def relative_error(sums: Tensor, exact: Tensor) -> float:
    error = (sums - exact).abs()
    return float(torch.where(error == 0, 0.0, error / exact.abs()).max()) if error.numel() else 0.0


def assert_equal(got: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert list(got) == list(expected)
    for name, value in got.items():
        if ".sums" in name:
            assert value.shape == expected[name].shape
            assert relative_error(value, expected[name]) <= 1e-7, name
        else:
            assert same_bytes(value, expected[name]), f"{name}: {differing(value, expected[name])}"


def check(case: Case, device: str = "cuda:0") -> None:
    case = on(device, case)
    with torch.device(device):
        assert_equal(run(_ops, case), run(reference, case))


@pytest.mark.parametrize("tasks", [*range(1, 21), 64])
@pytest.mark.parametrize("kind", list(DTYPES))
def test_number_of_tasks(kind: str, tasks: int) -> None:
    state = BF16 if tasks % 2 else F32
    check(make_case((17, 264, 8200), tasks, kind, state, tasks % 3, tasks))


@pytest.mark.parametrize("zero_sum", [0, 1, 2])
@pytest.mark.parametrize("state", [F32, BF16])
@pytest.mark.parametrize("kind", list(DTYPES))
def test_dtypes_and_rules(kind: str, state: torch.dtype, zero_sum: int) -> None:
    check(make_case(SMALL, 3, kind, state, zero_sum, seed=zero_sum))


@pytest.mark.parametrize("kind", list(DTYPES))
def test_sizes_around_blocks_and_chunks(kind: str) -> None:
    check(make_case(EDGES, 5, kind, BF16, zero_sum=1))


@pytest.mark.parametrize("kind", list(DTYPES))
def test_misaligned_inputs_among_nan(kind: str) -> None:
    def place(tensor: Tensor) -> Tensor:
        buffer = torch.full((tensor.numel() + 1,), torch.nan, dtype=tensor.dtype)
        buffer[1:] = tensor
        return buffer[1:]

    check(make_case(SMALL, 3, kind, place=place))


@pytest.mark.parametrize(("kind", "code"), [("fp32", 1), ("fp32", 2), ("bf16", 2), ("fp16", 1)])
def test_rounding_of_the_base(kind: str, code: int) -> None:
    case = make_case((33, 1032), 2, kind)
    case.models = [[t.to((BF16, F16)[code - 1]) for t in model] for model in case.models]
    case.via = [code, code]
    check(case)


def test_conversions_of_every_16_bit_value() -> None:
    for dtype in (BF16, F16):
        values = torch.arange(65536, dtype=torch.int32).to(torch.int16).view(dtype).cuda()
        values = values[values.isfinite()]
        u, planes, _ = _ops.unify([values], [], 1, 0, F32, [])
        expected = reference.unify([values], [], 1, 0, F32, [])
        assert same_bytes(u, expected[0])
        assert same_bytes(planes[0], expected[1][0])
        for narrow in (BF16, F16):
            outs = [torch.empty(len(values), dtype=narrow, device="cuda") for _ in range(2)]
            for module, out in zip((_ops, reference), outs, strict=True):
                module.decouple_([out], u, planes[0], torch.ones(1, device="cuda"), [], [])
            assert same_bytes(*outs)


def model(seed: int, dtype: torch.dtype = F32, device: str = "cuda") -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    sizes = {"w": (300, 257), "b": (31,), "s": (), "e": (0, 4)}
    return {n: torch.randn(s, generator=generator).to(dtype).to(device) for n, s in sizes.items()}


@pytest.mark.parametrize("rescale", ["global", "tensor_mean", "per_tensor"])
@pytest.mark.parametrize("dtype", [F32, BF16])
def test_states_by_name(rescale: str, dtype: torch.dtype) -> None:
    """Each step starts from the same state; rescalers agree to 4 ulp."""
    rule, base = cx.FusionRule(rescale=rescale), model(0)

    def assert_same(got: cx.UnifiedDelta, expected: cx.UnifiedDelta) -> None:
        for name, u in expected.delta.items():
            assert same_bytes(got.delta[name], u)
        for task in expected.tasks:
            for name, mask in expected.packed_mask(task).items():
                assert same_bytes(got.packed_mask(task)[name], mask)
            ours, theirs = got.rescaler(task), expected.rescaler(task)
            if not isinstance(ours, float):
                ours, theirs = list(ours.values()), list(theirs.values())  # type: ignore[union-attr]
            assert ours == pytest.approx(theirs, rel=4 * ULP)

    tasks = {"a": model(1), "b": model(2)}
    state = cx.unify(tasks, base, rule=rule, dtype=dtype, backend="cuda")
    assert_same(state, cx.unify(tasks, base, rule=rule, dtype=dtype, backend="reference"))
    absorbed = cx.absorb(state, "c", model(3), base, backend="cuda")
    assert_same(absorbed, cx.absorb(state, "c", model(3), base, backend="reference"))
    other = cx.unify({"d": model(4)}, base, rule=rule, dtype=dtype)
    merged = cx.merge(state, other, backend="cuda")
    assert_same(merged, cx.merge(state, other, backend="reference"))
    cx.absorb_(state, "c", model(3), base)
    assert_same(state, absorbed)
    for task in state.tasks:
        expected = cx.decouple(state, task, base, backend="reference")
        for name, theta in cx.decouple(state, task, base).items():
            assert same_bytes(theta, expected[name])


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_values_that_are_not_finite(value: float) -> None:
    state = cx.unify({"a": model(1)}, model(0))
    before = {name: u.clone() for name, u in state.delta.items()}
    broken = model(2)
    broken["b"][3] = value
    for fuse in (cx.absorb, cx.absorb_):
        with pytest.raises(ValueError, match=r"'x'.*'b'"):
            fuse(state, "x", broken, model(0))
    with pytest.raises(ValueError, match=r"'x'.*'b'"):
        cx.unify({"x": broken}, model(0))
    assert state.tasks == ("a",)
    assert all(same_bytes(u, before[name]) for name, u in state.delta.items())


def test_two_runs_give_the_same_bits() -> None:
    case = on("cuda", make_case((65537, 200_000, 3), 7, "bf16"))
    with torch.device("cuda"):
        first, second = run(_ops, case), run(_ops, case)
    assert all(same_bytes(value, second[name]) for name, value in first.items())


def test_side_stream() -> None:
    """Everything, tables included, is queued on the current stream, behind what is queued there."""
    case = on("cuda", make_case((300_000, 77), 3, "bf16", seed=5))
    with torch.device("cuda"):
        expected = run(reference, case)
        models = [[t.clone() for t in one] for one in case.models]
        for tensor in (t for one in case.models for t in one):
            tensor.zero_()
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            torch.cuda._sleep(50_000_000)  # what follows would show values not yet there
            for one, originals in zip(case.models, models, strict=True):
                for tensor, original in zip(one, originals, strict=True):
                    tensor.copy_(original)
            got = run(_ops, case)
        torch.cuda.current_stream().wait_stream(stream)
    assert_equal(got, expected)


@pytest.mark.skipif("torch.cuda.device_count() < 2", reason="needs a second GPU")
def test_second_device() -> None:
    assert torch.cuda.current_device() == 0
    check(make_case(EDGES, 3, "mixed"), "cuda:1")
    assert torch.cuda.current_device() == 0


def captured(function: Callable[[], Any]) -> tuple[torch.cuda.CUDAGraph, Any]:
    """A graph of a call, after a warm-up on a side stream."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        function()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = function()
    return graph, result


def test_graph_of_raw_operators() -> None:
    case = on("cuda", make_case((70_000, 31), 3, "bf16"))
    flat = [t for one in case.models[:3] for t in one]
    lam = case.rescalers[:3].clone()

    def fuse() -> Any:
        u, planes, sums = OPS.unify(flat, case.base, 3, 0, F32, [])
        return OPS.absorb(u, planes, lam, case.models[3], case.base, 0, []), sums

    graph, (absorbed, sums) = captured(fuse)
    for tensor in (*flat, lam):  # what a replay has to see
        tensor.mul_(0.5)
    graph.replay()
    (u, planes, more), first = fuse()
    assert same_bytes(absorbed[0], u)
    assert all(same_bytes(*pair) for pair in zip(absorbed[1], planes, strict=True))
    assert same_bytes(absorbed[2], more)
    assert same_bytes(sums, first)


def test_graph_of_decouple_() -> None:
    base = model(0)
    state = cx.unify({"a": model(1), "b": model(2)}, base)
    live = {name: torch.empty_like(t) for name, t in base.items()}
    graph, _ = captured(lambda: cx.decouple_(state, "b", base, out=live))
    for tensor in base.values():
        tensor.add_(1.0)
    graph.replay()
    expected = cx.decouple(state, "b", base, backend="reference")
    assert all(same_bytes(live[name], theta) for name, theta in expected.items())


def test_graph_without_a_warm_up() -> None:
    """A clear error in place of a synchronisation that would break the capture."""
    tensors = [torch.randn(1000, device="cuda")]
    graph = torch.cuda.CUDAGraph()
    with pytest.raises(RuntimeError, match="captured"), torch.cuda.graph(graph):
        OPS.measure(tensors, [], [])


def test_no_operator_waits_for_the_gpu() -> None:
    case = on("cuda", make_case((70_000, 31), 3, "bf16"))
    with torch.device("cuda"):
        run(_ops, case)  # tables are copied here
        before = torch.cuda.get_sync_debug_mode()
        torch.cuda.set_sync_debug_mode("error")
        try:
            flat = [t for one in case.models[:3] for t in one]
            u, planes, _ = OPS.unify(flat, case.base, 3, 0, F32, [])
            lam = case.rescalers[:3]
            OPS.absorb(u, planes, lam, case.models[3], case.base, 0, [])
            OPS.merge(u, planes, lam, u, planes, lam, case.numels, 0)
            OPS.measure(case.models[3], case.base, [])
        finally:
            torch.cuda.set_sync_debug_mode(before)


def test_memory_beside_the_outputs() -> None:
    """Absorb needs at most 1 % of its outputs more than them."""
    numels = [64 * 2**20]
    base = [torch.zeros(numels[0], dtype=BF16, device="cuda")]
    new = [torch.ones(numels[0], dtype=BF16, device="cuda")]
    u, planes, _ = OPS.unify([*new] * 8, base, 8, 0, BF16, [])
    lam = torch.ones(8, 1, device="cuda")
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    made, more, _ = OPS.absorb(u, planes, lam, new, base, 0, [])
    outputs = made.nbytes + sum(p.nbytes for p in more)
    assert torch.cuda.max_memory_allocated() - before <= 1.01 * outputs


@pytest.mark.parametrize("name", ["unify", "absorb", "absorb_", "merge", "decouple_", "measure"])
def test_opcheck(name: str) -> None:
    case = on("cuda", make_case((5, 70_000), 2, "fp32"))
    lam, new = case.rescalers[:2].clone(), case.models[2]
    flat = [t for one in case.models[:2] for t in one]
    u, planes, _ = OPS.unify(flat, case.base, 2, 0, F32, [])
    arguments: dict[str, tuple[Any, ...]] = {
        "unify": (flat, case.base, 2, 0, F32, []),
        "absorb": (u, planes, lam, new, case.base, 0, []),
        "absorb_": (u, planes, torch.zeros_like(planes[0]), lam, new, case.base, 0, []),
        "merge": (u, planes, lam, u.clone(), [p.clone() for p in planes], lam, case.numels, 0),
        "decouple_": ([t.clone() for t in new], u, planes[0], lam[0].clone(), case.base, []),
        "measure": (new, case.base, []),
    }
    torch.library.opcheck(getattr(OPS, name).default, arguments[name])


def test_tensors_on_two_devices_are_refused() -> None:
    tensors = [torch.zeros(8, device="cuda"), torch.zeros(8)]
    with pytest.raises(ValueError, match="cpu"):
        OPS.measure(tensors, [], [])


@pytest.mark.slow
def test_past_2_to_the_31_elements() -> None:
    """Offsets beyond 32 bits: the last elements of one tensor, and a tensor behind it."""
    numel = 2**31 + 65_536 + 8
    free, _ = torch.cuda.mem_get_info()
    if free < 16 * numel:
        pytest.skip(
            f"needs {16 * numel / 2**30:.0f} GiB of GPU memory, {free / 2**30:.0f} are free"
        )
    generator = torch.Generator(device="cuda").manual_seed(0)
    tail = torch.randn(1000, generator=generator, device="cuda").to(BF16)
    long = torch.zeros(numel, dtype=BF16, device="cuda")
    long[-1000:] = tail
    tensors = [long, tail.clone()]
    u, planes, sums = OPS.unify(tensors, [], 1, 0, BF16, [])
    exact = tail.double().abs().sum()
    assert relative_error(sums[0].sum(), 2 * exact) <= 1e-7
    assert int(torch.count_nonzero(u)) == 2 * int(torch.count_nonzero(tail))
    assert same_bytes(u[numel - 1000 : numel], tail + 0.0)
    lam = torch.full((1, 2), 0.5, device="cuda")
    v, _, _ = OPS.absorb(u, planes, lam, tensors, [], 0, [])
    assert same_bytes(v[numel - 1000 : numel], tail + 0.0)
    out = [torch.empty_like(t) for t in tensors]
    OPS.decouple_(out, u, planes[0], lam, [], [])
    for expert in (out[0][-1000:], out[1]):
        assert same_bytes(expert, (tail.float() * 0.5 + 0.0).to(BF16))
