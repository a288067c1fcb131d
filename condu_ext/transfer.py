"""The same state elsewhere: on other devices, or with its tensors in another memory order."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch

from condu_ext.layout import Arena, ModelSpec, TensorSpec, empty_arena, group_by_device
from condu_ext.reference import pack_bits, unpack_bits


def _new_arena(
    spec: ModelSpec, index: Sequence[int], tasks: int, dtype: torch.dtype, device: torch.device
) -> Arena:
    arena = empty_arena(index, [spec.tensors[k].local_numel for k in index], dtype, device)
    arena.planes = [
        torch.zeros(arena.u.numel() // 8, dtype=torch.uint8, device=device) for _ in range(tasks)
    ]
    arena.num, arena.den = (
        torch.zeros(tasks, len(index), dtype=torch.float64, device="cpu") for _ in range(2)
    )
    arena.rescaler = torch.zeros(tasks, len(index), dtype=torch.float32, device=device)
    return arena


def _copy_tensor(
    old: Arena, source: int, old_entry: TensorSpec, new: Arena, target: int, new_entry: TensorSpec
) -> None:
    """Tensor number ``source`` of an arena becomes number ``target`` of another."""
    numel, same = new_entry.local_numel, old_entry.order == new_entry.order
    start, first = old.starts[source], new.starts[target]
    values = old.u[start : start + numel]
    if not same:
        values = new_entry.flatten(old_entry.unflatten(values))
    new.u[first : first + numel] = values.to(new.device)
    for old_plane, new_plane in zip(old.planes, new.planes, strict=True):
        packed = old_plane[start // 8 : (start + numel + 7) // 8]
        if not same:
            mask = old_entry.unflatten(unpack_bits(packed, numel))
            packed = pack_bits(new_entry.flatten(mask))
        new_plane[first // 8 : (first + numel + 7) // 8] = packed.to(new.device)
    for table in ("num", "den", "rescaler"):
        getattr(new, table)[:, target] = getattr(old, table)[:, source].to(
            getattr(new, table).device
        )


def rearranged(
    spec: ModelSpec,
    arenas: Sequence[Arena],
    devices: Sequence[torch.device],
    orders: Sequence[tuple[int, ...]],
) -> tuple[ModelSpec, list[Arena]]:
    """Copies of a state's arenas with tensor k on ``devices[k]`` in memory order ``orders[k]``."""
    entries = tuple(replace(t, order=order) for t, order in zip(spec.tensors, orders, strict=True))
    wanted = replace(spec, tensors=entries)
    tasks, dtype = len(arenas[0].planes), arenas[0].u.dtype
    copies = [
        _new_arena(wanted, index, tasks, dtype, device)
        for device, index in group_by_device(devices).items()
    ]
    places = {k: (copy, i) for copy in copies for i, k in enumerate(copy.index)}
    for old in arenas:
        for source, k in enumerate(old.index):
            new, target = places[k]
            _copy_tensor(old, source, spec.tensors[k], new, target, entries[k])
    return wanted, copies
