"""The formulas for a part of one tensor, as ``torch.compile`` takes them in.

Tensors are flat and equally long; results are written into ``u``, ``words`` or ``out``, sums are
returned. The masks of up to 31 tasks are the bits of one int32 an element: on a CPU (AVX-512, torch
2.15, 8 tasks) inductor's stores of bool tensors took 50 times as long as everything else together.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

WORD = 31
"""Tasks whose masks share an int32."""


def bits(masks: Sequence[Tensor]) -> Tensor:
    """One int32 from up to 31 masks."""
    word = masks[0].to(torch.int32)
    for t, mask in enumerate(masks[1:], 1):
        word = word | (mask.to(torch.int32) << t)
    return word


def bit(word: Tensor, task: int) -> Tensor:
    return ((word >> (task % WORD)) & 1) != 0


def unify_part(
    models: list[Tensor], base: Tensor, u: Tensor, words: list[Tensor]
) -> tuple[Tensor, Tensor]:
    theta_0 = base.float()
    deltas = [model.float() - theta_0 for model in models]
    total = deltas[0]
    for delta in deltas[1:]:
        total = total + delta
    flag = torch.where(total > 0, 1.0, -1.0)
    agreeing = [delta * flag for delta in deltas]
    best = agreeing[0]
    for value in agreeing[1:]:
        best = torch.maximum(best, value)
    den = _store(u, words, best, flag, [value > 0 for value in agreeing])
    return torch.stack([delta.abs().sum() for delta in deltas]), den


def absorb_part(
    old: Tensor,
    old_words: list[Tensor],
    rescalers: list[Tensor],
    model: Tensor,
    base: Tensor,
    u: Tensor,
    words: list[Tensor],
) -> tuple[Tensor, Tensor]:
    old = old.float()
    delta = model.float() - base.float()
    masks, sum_, most = _of_old_tasks(old_words, rescalers)
    flag = torch.where(old * sum_ + delta > 0, 1.0, -1.0)
    kept, new = old * flag, delta * flag
    best = torch.maximum(kept * most, new)
    den = _store(u, words, best, flag, [*(mask & (kept > 0) for mask in masks), new > 0])
    return delta.abs().sum(), den


def merge_part(
    a: Tensor,
    words_a: list[Tensor],
    rescalers_a: list[Tensor],
    b: Tensor,
    words_b: list[Tensor],
    rescalers_b: list[Tensor],
    u: Tensor,
    words: list[Tensor],
) -> Tensor:
    a, b = a.float(), b.float()
    masks_a, sum_a, most_a = _of_old_tasks(words_a, rescalers_a)
    masks_b, sum_b, most_b = _of_old_tasks(words_b, rescalers_b)
    flag = torch.where(a * sum_a + b * sum_b > 0, 1.0, -1.0)
    kept_a, kept_b = a * flag, b * flag
    best = torch.maximum(kept_a * most_a, kept_b * most_b)
    masks = [*(mask & (kept_a > 0) for mask in masks_a), *(mask & (kept_b > 0) for mask in masks_b)]
    return _store(u, words, best, flag, masks)


def decouple_part(
    u: Tensor, word: Tensor, bit: Tensor, rescaler: Tensor, base: Tensor, out: Tensor
) -> None:
    theta_0 = base.float()
    out.copy_(torch.where((word & bit) != 0, theta_0 + rescaler * u.float(), theta_0))


def _of_old_tasks(
    words: list[Tensor], rescalers: list[Tensor]
) -> tuple[list[Tensor], Tensor, Tensor]:
    """Masks; sum (in groups of four tasks) and maximum of λ_i·M_i."""
    masks = [bit(words[t // WORD], t) for t in range(len(rescalers))]
    terms = [torch.where(masks[t], rescalers[t], 0.0) for t in range(len(rescalers))]
    fours = [sum(terms[k + 1 : k + 4], terms[k]) for k in range(0, len(terms), 4)]
    most = terms[0]
    for term in terms[1:]:
        most = torch.maximum(most, term)
    return masks, sum(fours[1:], fours[0]), most


def _store(
    u: Tensor, words: list[Tensor], best: Tensor, flag: Tensor, masks: list[Tensor]
) -> Tensor:
    """Writes u = flag · max(best, 0) and the masks; returns Σ M·|u| of each task."""
    stored = _rounded(torch.where(best > 0, flag * best, 0.0), u.dtype)
    u.copy_(stored)
    for k, word in enumerate(words):
        word.copy_(bits(masks[WORD * k : WORD * (k + 1)]))
    size = stored.abs()
    return torch.stack([torch.where(mask, size, 0.0).sum() for mask in masks])


def _rounded(values: Tensor, dtype: torch.dtype) -> Tensor:
    """Values of float32 rounded to the state's dtype. To bfloat16 (ties to even) with integers:
    inductor drops a conversion there and back, and the sums would be of values not stored."""
    if dtype == torch.float32:
        return values
    bits = values.view(torch.int32)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) & -0x10000).view(torch.float32)
