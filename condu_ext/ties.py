"""Tensors that share memory: tied ones count once, any other overlap is an error."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from condu_ext.layout import memory_order


def _span(tensor: Tensor) -> tuple[int, int]:
    """First byte and end of the memory between a tensor's lowest and highest element."""
    steps = sum((n - 1) * s for n, s in zip(tensor.shape, tensor.stride(), strict=True))
    start = tensor.data_ptr()
    return start, start + (steps + 1) * tensor.element_size()


def same_memory(a: Tensor, b: Tensor) -> bool:
    return (
        a.data_ptr() == b.data_ptr()
        and a.shape == b.shape
        and a.stride() == b.stride()
        and a.dtype == b.dtype
    )


def _is_dense(tensor: Tensor) -> bool:
    return tensor.permute(memory_order(tensor)).is_contiguous()


def share_elements(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors have memory in common. Exact for views of one dtype: columns of one
    matrix may interleave without sharing an element."""
    if a.device != b.device or not a.numel() or not b.numel():
        return False
    (start_a, end_a), (start_b, end_b) = _span(a), _span(b)
    if end_a <= start_b or end_b <= start_a:
        return False
    size = a.element_size()
    aligned = (start_a - start_b) % size == 0 and b.element_size() == size
    if (_is_dense(a) and _is_dense(b)) or not aligned:
        return True
    first = min(start_a, start_b)
    seen = torch.zeros((max(end_a, end_b) - first) // size, dtype=torch.bool, device="cpu")
    seen.as_strided(a.shape, a.stride(), (start_a - first) // size).fill_(True)
    return bool(seen.as_strided(b.shape, b.stride(), (start_b - first) // size).any())


def find_shared(tensors: Iterable[tuple[str, Tensor]]) -> tuple[str, str] | None:
    """The first two names, in memory order, whose tensors have elements in common."""
    sorted_by_start = sorted(tensors, key=lambda item: item[1].data_ptr())
    open_spans: list[tuple[int, str, Tensor]] = []
    for name, tensor in sorted_by_start:
        start, end = _span(tensor)
        open_spans = [span for span in open_spans if span[0] > start]
        for _, other, earlier in open_spans:
            if share_elements(earlier, tensor):
                return other, name
        open_spans.append((end, name, tensor))
    return None


def find_aliases(who: str, tensors: Mapping[str, Tensor]) -> dict[str, str]:
    """Tied tensors: later name → first name of the same memory, shape, stride, dtype and sign.

    Raises:
        ValueError: two tensors share only a part of their memory; the message names both.
    """
    aliases: dict[str, str] = {}
    first: dict[tuple[object, ...], str] = {}
    for name, tensor in tensors.items():
        if tensor.numel():
            where = (tensor.device, tensor.data_ptr(), tensor.shape, tensor.stride())
            key = (*where, tensor.dtype, tensor.is_neg())
            if first.setdefault(key, name) != name:
                aliases[name] = first[key]
    if shared := find_shared([(name, tensors[name]) for name in first.values()]):
        raise ValueError(
            f"{who}: tensors {shared[0]!r} and {shared[1]!r} share a part of their memory"
        )
    return aliases
