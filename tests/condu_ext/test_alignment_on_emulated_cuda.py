"""The CUDA kernels of aligned merging, emulated on the CPU, against the specification.

Every case runs with the threads and blocks in both orders, which must not make a difference.
"""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType

import pytest
import torch
from adapters import adapter, awkward
from kernel_cases import BF16, DTYPES, F16, F32, SMALL, differing, guarded, same_bytes
from torch import Tensor

from condu_ext import _alignment_cuda, _tables, alignment_reference

pytestmark = pytest.mark.usefixtures("poisoned")
# Tensors that typed kernels take (whole groups of eight), round the tiles' borders, and others.
WHOLE = (8, 16, 2048, 2056, 8184, 8192, 8200, 65536, 65544)
SIZES = (*SMALL, *WHOLE, 8191, 8193, 65537, 131073)


@pytest.fixture(autouse=True)
def kernels(emulated: object) -> None:
    """Every test runs on the emulated kernels."""


Run = Callable[..., list[Tensor]]


def check(emulator: ModuleType, run: Run) -> None:
    """``run(module)`` gives the same bytes with the kernels, in both orders, and the reference."""
    expected = run(alignment_reference)
    for order in (False, True):
        emulator.reverse(order)
        for k, (found, right) in enumerate(zip(run(_alignment_cuda), expected, strict=True)):
            assert same_bytes(found, right), f"{k}, reversed {order}: {differing(found, right)}"


def pair(kind: str, first: int, sizes: tuple[int, ...] = SIZES) -> tuple[list[Tensor], ...]:
    g = adapter(sizes, kind, 1).values()
    return list(g), list(adapter(sizes, kind, 2, first).values())


# "mixed" also gives every pair of dtypes.
KINDS = [("fp32", 0), ("bf16", 0), ("fp16", 0), ("mixed", 0), ("mixed", 1), ("mixed", 2)]


@pytest.mark.parametrize("top", [1, 2, 10])
@pytest.mark.parametrize("kind", DTYPES)
def test_magnitude_threshold(emulator: ModuleType, kind: str, top: int) -> None:
    g, _ = pair(kind, 0)
    each, whole = [-(-t.numel() // top) for t in g], -(-sum(SIZES) // top)
    check(emulator, lambda module: [module.magnitude_threshold(g, each)])
    check(emulator, lambda module: [module.magnitude_threshold(g, [whole])])


@pytest.mark.parametrize("dtype", [F32, BF16, F16])
def test_every_rank(emulator: ModuleType, dtype: torch.dtype) -> None:
    values = awkward(70, dtype, torch.Generator().manual_seed(0))
    for rank in range(71):
        check(emulator, lambda module, rank=rank: [module.magnitude_threshold([values], [rank])])


@pytest.mark.parametrize("value", [torch.inf, -torch.inf, torch.nan, -torch.nan])
@pytest.mark.parametrize("dtype", [F32, BF16, F16])
def test_not_finite(emulator: ModuleType, dtype: torch.dtype, value: float) -> None:
    g = [t.to(dtype) for t in (torch.ones(100), torch.ones(8192), torch.ones(33))]
    g[1][8000] = value
    found = _alignment_cuda.magnitude_threshold(g, [50, 9, 1])
    assert found.isnan().tolist() == [False, True, False]
    assert _alignment_cuda.magnitude_threshold(g, [50]).isnan().all()


@pytest.mark.parametrize("to_reference", [False, True])
@pytest.mark.parametrize(("kind", "first"), KINDS)
def test_align(emulator: ModuleType, kind: str, first: int, to_reference: bool) -> None:
    g, w = pair(kind, first)
    limits = alignment_reference.magnitude_threshold(g, [-(-t.numel() // 3) for t in g])
    special = [0.0, 1 + 2**-20, torch.nan, torch.inf, -1.0, 2.0**-149]
    limits[2 : 2 + 4 * len(special) : 4] = torch.tensor(special)

    def run(module: ModuleType) -> list[Tensor]:
        mine = [t.clone() for t in w]
        return [module.align_(mine, g, limits, to_reference), *mine]

    check(emulator, run)


@pytest.mark.parametrize("weight", [0.5, 0.3, 1.0])
@pytest.mark.parametrize(("kind", "first"), KINDS)
def test_average(emulator: ModuleType, kind: str, first: int, weight: float) -> None:
    g, w = pair(kind, first)

    def run(module: ModuleType) -> list[Tensor]:
        mine = [t.clone() for t in g]
        module.average_(mine, w, weight)
        return mine

    check(emulator, run)


@pytest.mark.parametrize("kind", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("shift", [8, 9])
def test_only_the_tensors_are_written(emulator: ModuleType, kind: str, shift: int) -> None:
    """Also where they do not lie on 16-byte boundaries."""
    g, w = pair(kind, 0, (8192, 24, 13, 0))
    limits = torch.full((len(g),), 0.5)

    def placed(values: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        made = [guarded(t.numel(), t.dtype, shift) for t in values]
        for (_, view), t in zip(made, values, strict=True):
            view.copy_(t)
        return [buffer for buffer, _ in made], [view for _, view in made]

    def run(module: ModuleType) -> list[Tensor]:
        (w_buffers, w_views), (g_buffers, g_views) = placed(w), placed(g)
        module.align_(w_views, g, limits, True)
        module.average_(g_views, w, 0.3)
        return w_buffers + g_buffers

    check(emulator, run)


def test_refused() -> None:
    g, w = pair("fp32", 0, (8, 5))
    for ranks in ([], [1, 2, 3], [9, 1], [-1], [14]):
        with pytest.raises(ValueError, match="rank"):
            _alignment_cuda.magnitude_threshold(g, ranks)
    for limits in (torch.zeros(3), torch.zeros(2, dtype=torch.float64)):
        with pytest.raises(ValueError, match="threshold"):
            _alignment_cuda.align_(w, g, limits, True)
    for call in (
        lambda: _alignment_cuda.align_(w, g[:1], torch.zeros(2), True),
        lambda: _alignment_cuda.average_(g, [w[1], w[0]], 0.5),
    ):
        with pytest.raises(ValueError, match="elements"):
            call()


def test_one_table_for_a_training_loop(monkeypatch: pytest.MonkeyPatch) -> None:
    """Later steps copy nothing to the device."""
    g, w = pair("mixed", 1)
    uploads = []
    upload = _tables.upload
    monkeypatch.setattr(_tables, "upload", lambda *given: uploads.append(1) or upload(*given))
    for _ in range(3):
        _alignment_cuda.align_(w, g, torch.ones(len(g)), False)
    assert len(uploads) == 1
