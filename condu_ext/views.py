"""What arenas hold, by tensor name: the unified delta and the masks, in the tensors' own shapes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar

from torch import Tensor

from condu_ext.layout import Arena, ModelSpec, TensorSpec
from condu_ext.reference import pack_bits, unpack_bits

Value = TypeVar("Value")


def by_name(
    spec: ModelSpec,
    arenas: Sequence[Arena],
    value: Callable[[Arena, TensorSpec, slice, int], Value],
) -> dict[str, Value]:
    """value(arena, spec, slice in the arena, position in the arena) for every name; tied names
    share one."""
    found: dict[int, Value] = {}
    for arena in arenas:
        for k, (position, start) in enumerate(zip(arena.index, arena.starts, strict=True)):
            entry = spec.tensors[position]
            part = slice(start, start + entry.local_numel)
            found[position] = value(arena, entry, part, k)
    named = {entry.name: found[k] for k, entry in enumerate(spec.tensors)}
    return named | {alias: named[target] for alias, target in spec.aliases.items()}


def unified_delta(spec: ModelSpec, arenas: Sequence[Arena]) -> dict[str, Tensor]:
    """Views of the arenas, sharded as the tensors are."""
    return by_name(
        spec, arenas, lambda arena, entry, part, k: entry.wrap(entry.unflatten(arena.u[part]))
    )


def _bits(arena: Arena, part: slice, task: int) -> Tensor:
    return arena.planes[task][part.start // 8 : (part.stop + 7) // 8]


def mask_bits(spec: ModelSpec, arenas: Sequence[Arena], task: int) -> dict[str, Tensor]:
    """Of each tensor's local part the packed mask in memory order: views."""
    return by_name(spec, arenas, lambda arena, entry, part, k: _bits(arena, part, task))


def masks(spec: ModelSpec, arenas: Sequence[Arena], task: int) -> dict[str, Tensor]:
    """Masks as bool tensors."""
    return by_name(
        spec, arenas, lambda arena, entry, part, k: shaped_mask(entry, _bits(arena, part, task))
    )


def packed_masks(spec: ModelSpec, arenas: Sequence[Arena], task: int) -> dict[str, Tensor]:
    """Masks as bits in logical order, of whole tensors."""
    return by_name(
        spec, arenas, lambda arena, entry, part, k: logical_bits(entry, _bits(arena, part, task))
    )


def shaped_mask(entry: TensorSpec, bits: Tensor) -> Tensor:
    """bool, in the tensor's shape and sharded as it is, from bits in memory order."""
    return entry.wrap(entry.unflatten(unpack_bits(bits, entry.local_numel)))


def logical_bits(entry: TensorSpec, bits: Tensor) -> Tensor:
    """A copy of a whole tensor's mask bits, in logical (row-major) order, from memory order."""
    if entry.order == tuple(range(len(entry.order))):
        return bits.clone()
    mask = entry.unflatten(unpack_bits(bits, entry.numel))
    return pack_bits(mask.reshape(-1))
