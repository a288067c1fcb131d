"""The operators of aligned merging: schemas, fakes, ``torch.compile``, arguments refused."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from kernel_cases import BF16, F16, F32, same_bytes
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

import condu_ext  # noqa: F401  (registers the operators)

OPS = torch.ops.condu
SIZES = [5, 70000, 0]
DTYPES = [F32, BF16, F16]


def tensors(seed: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [
        torch.randn(n, generator=generator).to(dtype)
        for n, dtype in zip(SIZES, DTYPES, strict=True)
    ]


def arguments() -> dict[str, tuple[Any, ...]]:
    """Good arguments for every operator."""
    return {
        "magnitude_threshold": (tensors(0), [2, 35000, 0]),
        "magnitude_threshold, joint": (tensors(0), [35000]),
        "align_": (tensors(1), tensors(0), torch.tensor([0.1, 0.5, 0.0]), False),
        "align_, to the reference": (tensors(1), tensors(0), torch.zeros(3), True),
        "average_": (tensors(0), tensors(1), 0.3),
    }


def op(name: str) -> Any:
    return getattr(OPS, name.split(",")[0]).default


@pytest.mark.parametrize("name", list(arguments()))
def test_opcheck(name: str) -> None:
    torch.library.opcheck(op(name), arguments()[name])


@pytest.mark.parametrize("name", list(arguments()))
def test_fake_results_have_the_shapes_of_real_ones(name: str) -> None:
    real = op(name)(*arguments()[name])
    mode = FakeTensorMode()

    def fake(value: Any) -> Any:
        if isinstance(value, Tensor):
            return mode.from_tensor(value)
        return [fake(v) for v in value] if isinstance(value, list) else value

    given = [fake(v) for v in arguments()[name]]
    with mode:
        found = op(name)(*given)
    assert (found is None) == (real is None)
    if real is not None:
        assert (found.shape, found.dtype) == (real.shape, real.dtype)


def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    torch.compiler.reset()
    return torch.compile(function, fullgraph=True, backend="aot_eager")


def test_compile() -> None:
    """A whole step of the method; what is written is the caller's own."""

    def step(w: list[Tensor], g: list[Tensor]) -> tuple[Tensor, Tensor]:
        limits = OPS.magnitude_threshold(g, [2, 35000, 0])
        changed = OPS.align_(w, g, 0.5 * limits, True)
        OPS.average_(g, w, 0.25)
        return limits, changed + (w[0] > 0).sum()

    results = []
    for run in (step, compiled(step)):
        w, g = tensors(1), tensors(0)
        results.append([*run(w, g), *w, *g])
    assert all(same_bytes(*both) for both in zip(*results, strict=True))
    assert not torch.equal(results[0][2], tensors(1)[0])
    assert not torch.equal(results[0][5], tensors(0)[0])


# ---- arguments that are refused ------------------------------------------------------------------


LISTS = [("magnitude_threshold", 0), ("align_", 0), ("align_", 1), ("average_", 0), ("average_", 1)]


def with_tensor(name: str, position: int, tensor: Tensor) -> None:
    given = list(arguments()[name])
    given[position] = [given[position][0], tensor, given[position][2]]
    op(name)(*given)


@pytest.mark.parametrize(("name", "position"), LISTS)
def test_tensors(name: str, position: int) -> None:
    with pytest.raises(ValueError, match="contiguous"):
        with_tensor(name, position, torch.zeros(140000)[::2])
    for dtype in (torch.float64, torch.int32, torch.float8_e4m3fn):
        with pytest.raises(TypeError, match=str(dtype)):
            with_tensor(name, position, torch.zeros(70000, dtype=dtype))


@pytest.mark.parametrize(("name", "position"), LISTS[1:])
def test_sizes(name: str, position: int) -> None:
    with pytest.raises(ValueError, match="69999"):
        with_tensor(name, position, torch.zeros(69999))
    given = list(arguments()[name])
    given[position] = given[position][:-1]
    with pytest.raises(ValueError, match=r"elements|threshold"):
        op(name)(*given)


@pytest.mark.parametrize("ranks", [[], [1, 2], [1, 2, 3, 4], [6, 1, 0], [1, 1, 1], [-1], [70006]])
def test_ranks(ranks: list[int]) -> None:
    with pytest.raises(ValueError, match="rank"):
        OPS.magnitude_threshold(tensors(0), ranks)


@pytest.mark.parametrize(
    "threshold", [torch.zeros(2), torch.zeros(3, 1), torch.zeros(3, dtype=torch.float64)]
)
def test_thresholds(threshold: Tensor) -> None:
    w = tensors(1)
    with pytest.raises(ValueError, match="threshold"):
        OPS.align_(w, tensors(0), threshold, False)
    assert all(same_bytes(*both) for both in zip(w, tensors(1), strict=True))


def test_strided_thresholds_are_read_by_value() -> None:
    limits = torch.tensor([0.1, 99.0, 0.5, 99.0, 0.0, 99.0])[::2]
    results = []
    for threshold in (limits, limits.contiguous()):
        w = tensors(1)
        results.append([OPS.align_(w, tensors(0), threshold, False), *w])
    assert all(same_bytes(*both) for both in zip(*results, strict=True))
