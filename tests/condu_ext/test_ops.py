"""torch.ops.condu: schemas, fake tensors, torch.compile, and arguments that are refused."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from kernel_cases import BF16, F16, F32, same_bytes
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

import condu_ext  # noqa: F401  (registers the operators)

SIZES = [5, 70000, 0]
ARENA = 512 + 70144
CHUNKS = 3
T = 3
OPS = torch.ops.condu


def models(seed: int = 0, tasks: int = 1, dtype: torch.dtype = F32) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(n, generator=generator).to(dtype) for _ in range(tasks) for n in SIZES]


def state(tasks: int = T, dtype: torch.dtype = F32) -> tuple[Tensor, list[Tensor], Tensor]:
    u, planes, _ = OPS.unify(models(1, tasks), models(0), tasks, 0, dtype, [])
    return u, planes, torch.full((tasks, len(SIZES)), 1.5)


def arguments() -> dict[str, tuple[Any, ...]]:
    """Good arguments for every operator."""
    u, planes, rescaler = state()
    v, other_planes, other_rescaler = state(2)
    added = torch.zeros(ARENA // 8, dtype=torch.uint8)
    return {
        "unify": (models(1, T), models(0), T, 0, F32, []),
        "absorb": (u, planes, rescaler, models(2), models(0), 0, []),
        "absorb_": (u, planes, added, rescaler, models(2), models(0), 0, []),
        "merge": (u, planes, rescaler, v, other_planes, other_rescaler, SIZES, 0),
        "decouple_": (models(2), u, planes[0], rescaler[0].clone(), models(0), []),
        "measure": (models(2), models(0), [1, 2, 0]),
    }


def op(name: str) -> Any:
    return getattr(OPS, name).default


@pytest.mark.parametrize("name", list(arguments()))
@pytest.mark.parametrize("base", ["base", "deltas"])
def test_opcheck(name: str, base: str) -> None:
    given = list(arguments()[name])
    if base == "deltas" and name != "merge":
        position = {"unify": 1, "absorb": 4, "absorb_": 5, "decouple_": 4, "measure": 1}[name]
        given[position] = []
        if name == "measure":
            given[2] = []
    torch.library.opcheck(op(name), tuple(given))


def shapes(value: Any) -> Any:
    """Shapes, dtypes and devices of nested results."""
    if isinstance(value, Tensor):
        return tuple(value.shape), value.dtype
    return [shapes(v) for v in value] if isinstance(value, (tuple, list)) else value


def to_meta(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.to("meta")
    return [to_meta(v) for v in value] if isinstance(value, list) else value


@pytest.mark.parametrize("name", list(arguments()))
def test_fake_results_have_the_shapes_of_real_ones(name: str) -> None:
    expected = shapes(op(name)(*arguments()[name]))
    mode = FakeTensorMode()

    def fake(value: Any) -> Any:
        if isinstance(value, Tensor):
            return mode.from_tensor(value)
        return [fake(v) for v in value] if isinstance(value, list) else value

    given = [fake(v) for v in arguments()[name]]
    with mode:
        assert shapes(op(name)(*given)) == expected
    meta = op(name)(*map(to_meta, arguments()[name]))
    assert shapes(meta) == expected


def test_shapes() -> None:
    """As the module's documentation says."""
    given = arguments()
    u, planes, sums = op("unify")(*given["unify"])
    assert shapes((u, planes, sums)) == [
        ((ARENA,), F32),
        [((ARENA // 8,), torch.uint8)] * T,
        ((2 * T, CHUNKS), torch.float64),
    ]
    assert shapes(op("absorb")(*given["absorb"])[2]) == ((T + 2, CHUNKS), torch.float64)
    assert shapes(op("absorb_")(*given["absorb_"])) == ((T + 2, CHUNKS), torch.float64)
    assert shapes(op("merge")(*given["merge"])[2]) == ((T + 2, CHUNKS), torch.float64)
    assert shapes(op("measure")(*given["measure"])) == ((1, CHUNKS), torch.float64)
    assert op("decouple_")(*given["decouple_"]) is None


def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    torch.compiler.reset()
    return torch.compile(function, fullgraph=True, backend="aot_eager")


def test_compile_unify_and_absorb() -> None:
    def fuse(flat: list[Tensor], base: list[Tensor], new: list[Tensor], lam: Tensor) -> Any:
        u, planes, _ = OPS.unify([2 * t for t in flat], base, T, 0, F32, [])
        v, more, sums = OPS.absorb(u, planes, lam, new, base, 0, [])
        return v + 1, more, sums

    given = (models(1, T), models(0), models(2), state()[2])
    found, expected = compiled(fuse)(*given), fuse(*given)
    assert same_bytes(found[0], expected[0])
    assert all(same_bytes(*pair) for pair in zip(found[1], expected[1], strict=True))
    assert same_bytes(found[2], expected[2])


def test_compile_decouple() -> None:
    """The written tensors are the caller's own, also through the functionalised graph."""

    def expert(
        out: list[Tensor], u: Tensor, plane: Tensor, lam: Tensor, base: list[Tensor]
    ) -> Tensor:
        before = out[0] + 0
        OPS.decouple_(out, u, plane, lam, base, [])
        return out[0] - before

    u, planes, lam = state()
    results = []
    for run in (expert, compiled(expert)):
        out = models(5)
        difference = run(out, u, planes[1], lam[1], models(0))
        results.append([*out, difference])
    assert all(same_bytes(*pair) for pair in zip(*results, strict=True))
    assert not torch.equal(results[0][0], models(5)[0])


def test_compile_absorb_in_place() -> None:
    def step(
        u: Tensor, planes: list[Tensor], added: Tensor, lam: Tensor, new: list[Tensor]
    ) -> Tensor:
        sums = OPS.absorb_(u, planes, added, lam, new, [], 0, [])
        return sums.sum() + u.sum()

    results = []
    for run in (step, compiled(step)):
        u, planes, lam = state()
        added = torch.zeros(ARENA // 8, dtype=torch.uint8)
        total = run(u, planes, added, lam, models(2))
        results.append([u, *planes, added, total])
    assert all(same_bytes(*pair) for pair in zip(*results, strict=True))


# ---- arguments that are refused ------------------------------------------------------------------


def with_argument(name: str, position: int, value: Any) -> None:
    given = list(arguments()[name])
    given[position] = value
    op(name)(*given)


def replaced(tensors: list[Tensor], k: int, tensor: Tensor) -> list[Tensor]:
    return [*tensors[:k], tensor, *tensors[k + 1 :]]


# Position of each list of model or base tensors.
LISTS = [
    ("unify", 0), ("unify", 1), ("absorb", 3), ("absorb", 4), ("absorb_", 4), ("absorb_", 5),
    ("decouple_", 0), ("decouple_", 4), ("measure", 0), ("measure", 1),
]  # fmt: skip


@pytest.mark.parametrize(("name", "position"), LISTS)
def test_strided_tensors(name: str, position: int) -> None:
    tensors = arguments()[name][position]
    with pytest.raises(ValueError, match="contiguous"):
        with_argument(name, position, replaced(tensors, 1, torch.zeros(140000)[::2]))


@pytest.mark.parametrize("dtype", [torch.float64, torch.int32, torch.float8_e4m3fn])
@pytest.mark.parametrize(("name", "position"), LISTS)
def test_dtypes(name: str, position: int, dtype: torch.dtype) -> None:
    tensors = arguments()[name][position]
    with pytest.raises(TypeError, match=str(dtype)):
        with_argument(name, position, replaced(tensors, 1, torch.zeros(70000, dtype=dtype)))


@pytest.mark.parametrize(("name", "position"), LISTS)
def test_number_of_tensors(name: str, position: int) -> None:
    with pytest.raises(ValueError, match=r"element|model|rescaler"):
        with_argument(name, position, arguments()[name][position][:-1])


@pytest.mark.parametrize("name", ["unify", "absorb", "absorb_", "decouple_", "measure"])
def test_base_of_another_size(name: str) -> None:
    position = dict(LISTS)[name]
    tensors = arguments()[name][position]
    with pytest.raises(ValueError, match="69999"):
        with_argument(name, position, replaced(tensors, 1, torch.zeros(69999)))


@pytest.mark.parametrize("size", [0, ARENA - 512, ARENA + 512])
@pytest.mark.parametrize(
    ("name", "position"),
    [("absorb", 0), ("absorb_", 0), ("merge", 0), ("merge", 3), ("decouple_", 1)],
)
def test_size_of_the_arena(name: str, position: int, size: int) -> None:
    with pytest.raises(ValueError, match=f"arena of {size} elements.*{ARENA}"):
        with_argument(name, position, torch.zeros(size))


PLANES = [("absorb", 1), ("absorb_", 1), ("merge", 1), ("merge", 4)]


@pytest.mark.parametrize(("name", "position"), PLANES)
def test_planes(name: str, position: int) -> None:
    planes = arguments()[name][position]
    with pytest.raises(ValueError, match="planes"):
        with_argument(name, position, replaced(planes, 1, planes[1][:-1]))
    with pytest.raises(TypeError, match="uint8"):
        with_argument(name, position, replaced(planes, 1, planes[1].view(torch.int8)))
    strided = torch.zeros(ARENA // 4, dtype=torch.uint8)[::2]
    with pytest.raises(ValueError, match="contiguous"):
        with_argument(name, position, replaced(planes, 1, strided))


@pytest.mark.parametrize(("name", "position"), [("absorb_", 2), ("decouple_", 2)])
def test_single_planes(name: str, position: int) -> None:
    with pytest.raises(ValueError, match="planes"):
        with_argument(name, position, torch.zeros(8, dtype=torch.uint8))
    with pytest.raises(TypeError, match="uint8"):
        with_argument(name, position, torch.zeros(ARENA // 8, dtype=torch.int8))


@pytest.mark.parametrize(
    ("name", "position"),
    [("absorb", 2), ("absorb_", 3), ("merge", 2), ("merge", 5), ("decouple_", 3)],
)
def test_rescalers(name: str, position: int) -> None:
    good = arguments()[name][position]
    with pytest.raises(ValueError, match="rescaler"):
        with_argument(name, position, torch.ones(good.numel() + 1))
    with pytest.raises(ValueError, match="rescaler"):
        with_argument(name, position, good.double())
    # Any strides will do: the table is small and copied.
    spread = torch.stack([good, torch.full_like(good, torch.nan)], -1)[..., 0]
    assert not spread.is_contiguous()
    with_argument(name, position, spread)


def test_strided_rescalers_are_read_by_value() -> None:
    u, planes, _ = state(2)
    lam = torch.tensor([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]])
    transposed = lam.t().contiguous().t()
    assert not transposed.is_contiguous()
    found, expected = (
        OPS.absorb(u, planes, table, models(2), models(0), 0, [])[0] for table in (transposed, lam)
    )
    assert same_bytes(found, expected)


@pytest.mark.parametrize("tasks", [0, -1, 2])
def test_number_of_models(tasks: int) -> None:
    with pytest.raises(ValueError, match=f"9 tensors are not {tasks} models"):
        OPS.unify(models(1, T), models(0), tasks, 0, F32, [])


@pytest.mark.parametrize("zero_sum", [-1, 3])
@pytest.mark.parametrize(
    ("name", "position"), [("unify", 3), ("absorb", 5), ("absorb_", 6), ("merge", 7)]
)
def test_unknown_zero_sum(name: str, position: int, zero_sum: int) -> None:
    with pytest.raises((ValueError, RuntimeError)):
        with_argument(name, position, zero_sum)


@pytest.mark.parametrize("dtype", [F16, torch.float64, torch.int32])
def test_state_dtypes(dtype: torch.dtype) -> None:
    with pytest.raises((TypeError, ValueError, RuntimeError)):
        with_argument("unify", 4, dtype)
    with pytest.raises((TypeError, ValueError, RuntimeError)):
        with_argument("absorb", 0, torch.zeros(ARENA, dtype=dtype))
    with pytest.raises((TypeError, ValueError, RuntimeError)):
        with_argument("decouple_", 1, torch.zeros(ARENA, dtype=dtype))


def test_states_of_two_dtypes() -> None:
    with pytest.raises(ValueError, match=r"float32.*bfloat16|bfloat16.*float32"):
        with_argument("merge", 3, torch.zeros(ARENA, dtype=BF16))


@pytest.mark.parametrize("codes", [[1], [1, 0, 0, 0], [3, 0, 0], [-1, 0, 0]])
@pytest.mark.parametrize(
    ("name", "position"), [("unify", 5), ("absorb", 6), ("decouple_", 5), ("measure", 2)]
)
def test_unknown_rounding(name: str, position: int, codes: list[int]) -> None:
    with pytest.raises((ValueError, TypeError)):
        with_argument(name, position, codes)


def test_a_refused_call_writes_nothing() -> None:
    given = list(arguments()["absorb_"])
    copies = [given[0].clone(), *(p.clone() for p in given[1]), given[2].clone()]
    given[4] = replaced(given[4], 1, torch.zeros(70000, dtype=torch.float64))
    with pytest.raises(TypeError):
        op("absorb_")(*given)
    after = [given[0], *given[1], given[2]]
    assert all(same_bytes(*pair) for pair in zip(after, copies, strict=True))
