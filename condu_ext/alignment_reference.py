"""Aligned merging in plain PyTorch: the tested specification of its kernels.

The functions have the signatures of the registered operators (:mod:`condu_ext._alignment_ops`),
work on any device and give what the kernels give, bit for bit (of a NaN, that it is one).

Source: PAM, arXiv 2506.03189.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def _select(values: Tensor, rank: int) -> Tensor:
    """The rank-th largest magnitude of a flat tensor; rank 0: +Inf; not all finite: NaN."""
    if rank == 0:
        return values.new_full((), torch.inf, dtype=torch.float32)
    magnitudes = values.float().abs()
    selected = magnitudes.sort(descending=True).values[rank - 1]
    return torch.where(magnitudes.isfinite().all(), selected, torch.nan)


def magnitude_threshold(reference: Sequence[Tensor], ranks: Sequence[int]) -> Tensor:
    """Of each tensor the ranks[k]-th largest magnitude; with one rank, of all tensors together."""
    if len(ranks) != len(reference):
        reference = [torch.cat([t.float() for t in reference])]
    return torch.stack([_select(t, rank) for t, rank in zip(reference, ranks, strict=True)])


def align_(
    current: Sequence[Tensor], reference: Sequence[Tensor], threshold: Tensor, to_reference: bool
) -> Tensor:
    """Where |g| ≥ τ and the signs of g and w conflict, w ← 0 or g; how many there were."""
    conflicts = torch.zeros((), dtype=torch.int64, device=threshold.device)
    for w, g, limit in zip(current, reference, threshold, strict=True):
        # Not g·w < 0, which underflows. Neither zeros nor NaN are above or below 0.
        opposed = ((g > 0) & (w < 0)) | ((g < 0) & (w > 0))
        conflict = opposed & (g.float().abs() >= limit)
        w.copy_(torch.where(conflict, g.to(w.dtype) if to_reference else 0.0, w))
        conflicts += conflict.sum()
    return conflicts


def average_(reference: Sequence[Tensor], current: Sequence[Tensor], weight: float) -> None:
    """g ← a·g + (1 − a)·w: each product and the sum rounded to fp32, then once to g's dtype."""
    for g, w in zip(reference, current, strict=True):
        kept = g.float() * g.new_tensor(weight, dtype=torch.float32)
        added = w.float() * g.new_tensor(1.0 - weight, dtype=torch.float32)
        g.copy_(kept + added)
