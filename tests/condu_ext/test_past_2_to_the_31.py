"""Offsets beyond 32 bits on the CPU: the end of one long tensor, and a tensor behind it."""

from __future__ import annotations

import pytest
import torch
from kernel_cases import BF16, F32, needs_memory, same_bytes
from torch import Tensor

from condu_ext import _ops
from condu_ext.layout import offsets

NUMEL = 2**31 + 65_536 + 5
TAIL = 1000


def long_and_short(seed: int) -> tuple[list[Tensor], list[Tensor]]:
    """Deltas that are 0 but for the end of the long tensor; and the same without the zeros."""
    generator = torch.Generator().manual_seed(seed)
    ends = [torch.randn(n, generator=generator).to(BF16) for n in (TAIL, 700)]
    long = torch.zeros(NUMEL, dtype=BF16)
    long[-TAIL:] = ends[0]
    return [long, ends[1]], ends


@pytest.mark.slow
def test_unify_absorb_and_decouple() -> None:
    needs_memory(11 << 30)
    start, end = offsets([NUMEL, 700])[0][1], NUMEL
    model, ends = long_and_short(0)
    u, planes, sums = _ops.unify(model, [], 1, 0, BF16, [])
    assert same_bytes(u[end - TAIL : end], ends[0])
    assert same_bytes(u[start : start + 700], ends[1])
    assert not u[: end - TAIL].any()
    expected = torch.stack([e.double().abs().sum() for e in ends])
    assert sums[0].sum() == pytest.approx(float(expected.sum()), rel=1e-7)
    del model

    model, more = long_and_short(1)
    small = [torch.cat([torch.zeros(5, dtype=BF16), e]) for e in ends]
    small_u, small_planes, _ = _ops.unify(small, [], 1, 0, BF16, [])
    small_more = [torch.cat([torch.zeros(5, dtype=BF16), e]) for e in more]
    rescaler = torch.full((1, 2), 1.25)
    plane, small_plane = torch.empty_like(planes[0]), torch.empty_like(small_planes[0])
    _ops.absorb_(u, planes, plane, rescaler, model, [], 0, [])
    _ops.absorb_(small_u, small_planes, small_plane, rescaler, small_more, [], 0, [])
    small_start = offsets([TAIL + 5, 705])[0][1]
    assert same_bytes(u[end - TAIL : end], small_u[5 : 5 + TAIL])
    assert same_bytes(u[start : start + 700], small_u[small_start + 5 : small_start + 705])
    assert not u[: end - TAIL].any()
    del model

    out = [torch.full((NUMEL,), torch.nan, dtype=BF16), torch.empty(700, dtype=F32)]
    _ops.decouple_(out, u, plane, torch.ones(1, 2), [], [])
    agreed = torch.where(u[end - TAIL : end].sign() == more[0].sign(), u[end - TAIL : end], 0)
    assert torch.equal(out[0][-TAIL:], agreed)
    assert not out[0][:-TAIL].any()
