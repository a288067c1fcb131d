"""Reading the unified checkpoint (:mod:`condu_ext.storage`): checked first, then trusted.

Every file is measured against ``config.json`` by size and checksum, and every tensor by name, shape
and dtype, before memory of its size is asked for. A sharded state is read by all processes of its
mesh: they check different files, and each reads its own part of every tensor.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from condu_ext._modes import without_autograd
from condu_ext.collective import Step
from condu_ext.contents import (
    TensorFiles,
    check_size,
    check_sum,
    delta_files,
    mask_files,
    private_file,
    refuse,
    until_settled,
)
from condu_ext.inputs import Model, check_mapping, check_mesh, check_tensor, is_private
from condu_ext.layout import Arena, ModelSpec, TensorSpec, empty_arena, group_by_device
from condu_ext.manifest import CheckpointError, Manifest, TaskEntry, read_manifest
from condu_ext.newcomer import claims_of_private
from condu_ext.reference import pack_bits, unpack_bits
from condu_ext.sharding import (
    ShardSpec,
    is_sharded,
    leads,
    local_part,
    mesh_of,
    place_in,
    shard_of,
    shard_of_shape,
)
from condu_ext.unified import UnifiedDelta

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

_SAFETENSORS_NAMES = {"F32": torch.float32, "BF16": torch.bfloat16, "U8": torch.uint8}


@without_autograd
def load(path: str | os.PathLike[str], *, like: Model | None = None) -> UnifiedDelta:
    """Read a state, checking sizes and checksums of all its files.

    Args:
        like: a model by name that shows where the state belongs: each tensor is read onto the
            device, and as the part of it, that the model's tensor is. Its values and dtypes do not
            matter, nor do further tensors. Without it the state is read onto the CPU, whole.

    Collective if ``like`` has sharded tensors; the folder must be one that all processes see.

    Raises:
        FileNotFoundError: no checkpoint there, or one of its files is missing.
        CheckpointError: an unknown format version, a wrong size or checksum, names, shapes or
            dtypes that do not fit; the message names the file.
        KeyError, ValueError, TypeError: ``like`` lacks a tensor, or has one of another shape, or
            one that cannot be fused.
    """
    directory, mesh = Path(path), mesh_of(like)
    return until_settled(
        lambda: _read_manifest(directory, mesh),
        lambda manifest: _read_state(directory, manifest, like, mesh),
    )


def _read_manifest(directory: Path, mesh: DeviceMesh | None) -> Manifest:
    """One process reads it for all, so that all read the same state."""
    with Step(mesh) as step:
        if leads(mesh):
            step.mine = read_manifest(directory)
    manifest: Manifest = step.all[0]
    return manifest


def _read_state(
    directory: Path, manifest: Manifest, like: Model | None, mesh: DeviceMesh | None
) -> UnifiedDelta:
    with Step(mesh) as step:
        _check_files(directory, manifest, mesh)
        spec, devices = _placed(manifest.spec, like)
        step.claims |= spec.claims()
        arenas = _read_delta(directory, manifest, spec, devices)
        for task in manifest.tasks:
            _read_mask(directory, manifest, spec, arenas, task)
        _set_sums(arenas, manifest.tasks)
        private = {
            task.name: _read_private(directory, manifest, task, like or {})
            for task in manifest.tasks
        }
        for name, tensors in private.items() if mesh is not None else ():
            step.claims |= claims_of_private(f"task {name!r}", tensors)
    state = UnifiedDelta(
        spec,
        arenas,
        tasks=[task.name for task in manifest.tasks],
        rule=manifest.rule,
        dtype=manifest.dtype,
        private=private,
    )
    state.base_name = manifest.base_name
    state.base_fingerprints = manifest.base_fingerprints
    return state


def _check_files(directory: Path, manifest: Manifest, mesh: DeviceMesh | None) -> None:
    """Sizes of all files, and checksums of those that fall to this process."""
    turn, turns = place_in(mesh), mesh.size() if mesh is not None else 1
    for number, (name, listed) in enumerate(manifest.files.items()):
        check_size(directory / name, listed)
        if number % turns == turn:
            check_sum(directory / name, listed)


def _placed(spec: ModelSpec, like: Model | None) -> tuple[ModelSpec, list[torch.device]]:
    """The spec with the shards of ``like``, and the device of each tensor."""
    if like is None:
        return spec, [torch.device("cpu")] * len(spec.tensors)
    check_mapping("like", like)
    entries, devices = [], []
    for entry in spec.tensors:
        name = next((name for name in spec.names_of(entry.name) if name in like), None)
        if name is None:
            raise KeyError(f"like: tensor {entry.name!r} is missing")
        tensor = check_tensor("like", name, like[name])
        if tuple(tensor.shape) != entry.shape:
            raise ValueError(
                f"like, tensor {name!r}: shape {tuple(tensor.shape)}, the state's is {entry.shape}"
            )
        shard = shard_of(f"like, tensor {name!r}", tensor)
        order = tuple(range(len(entry.shape))) if shard else entry.order
        entries.append(replace(entry, shard=shard, order=order))
        devices.append(local_part(tensor).device)
    known = {*spec.names, *spec.fixed, *spec.private_names}
    used = {n: t for n, t in like.items() if n in known or is_private(n, spec.private)}
    first = next((name for name, tensor in used.items() if is_sharded(tensor)), None)
    check_mesh("like", used, mesh := mesh_of(used), f"{first!r}")
    return replace(spec, tensors=tuple(entries), mesh=mesh), devices


def _places(spec: ModelSpec, arenas: Sequence[Arena]) -> dict[str, tuple[TensorSpec, Arena, int]]:
    """By name each fused tensor's spec, its arena, and where in that it starts."""
    return {
        spec.tensors[k].name: (spec.tensors[k], arena, start)
        for arena in arenas
        for k, start in zip(arena.index, arena.starts, strict=True)
    }


def _read_delta(
    directory: Path, manifest: Manifest, spec: ModelSpec, devices: Sequence[torch.device]
) -> list[Arena]:
    unified = _open_all(delta_files(directory, manifest))  # before memory is asked for
    arenas = [
        empty_arena(index, [spec.tensors[k].local_numel for k in index], manifest.dtype, device)
        for device, index in group_by_device(devices).items()
    ]
    places = _places(spec, arenas)
    for name, handle in unified:
        entry, arena, start = places[name]
        values = entry.flatten(_read_part(handle, name, entry.shard))
        arena.u[start : start + entry.local_numel] = values
    return arenas


def _read_mask(
    directory: Path, manifest: Manifest, spec: ModelSpec, arenas: Sequence[Arena], task: TaskEntry
) -> None:
    """Append a task's bit plane to every arena."""
    for arena in arenas:
        size = arena.u.numel() // 8
        arena.planes.append(torch.zeros(size, dtype=torch.uint8, device=arena.device))
    places = _places(spec, arenas)
    for name, handle in _open_all(mask_files(directory, manifest, task)):
        entry, arena, start = places[name]
        bits = _read_bits(handle, entry)
        arena.planes[-1][start // 8 : start // 8 + bits.numel()] = bits


def _set_sums(arenas: Sequence[Arena], tasks: Sequence[TaskEntry]) -> None:
    for arena in arenas:
        shape = (len(tasks), len(arena.index))
        for field, dtype, device in (
            ("num", torch.float64, torch.device("cpu")),
            ("den", torch.float64, torch.device("cpu")),
            ("rescaler", torch.float32, arena.device),
        ):
            rows = [[getattr(task, field)[k] for k in arena.index] for task in tasks]
            setattr(arena, field, torch.tensor(rows, dtype=dtype, device=device).view(shape))


def _read_part(handle: Any, name: str, shard: ShardSpec | None) -> Tensor:
    """A tensor, or what of it is here; nothing else of it is read."""
    part: Tensor = handle.get_slice(name)[shard.slices] if shard else handle.get_tensor(name)
    return part


def _read_bits(handle: Any, entry: TensorSpec) -> Tensor:
    """A mask's bits in the order of the arena, from those in logical order."""
    if entry.shard is None:
        packed: Tensor = handle.get_tensor(entry.name)
        if entry.order == tuple(range(len(entry.order))):
            return packed
        return pack_bits(entry.flatten(unpack_bits(packed, entry.numel).view(entry.shape)))
    rows, *columns = entry.shard.slices or (slice(0, 1),)
    width = math.prod(entry.shape[1:])
    first, end = rows.start * width, rows.stop * width
    packed = handle.get_slice(entry.name)[first // 8 : (end + 7) // 8]
    bits = unpack_bits(packed, 8 * packed.numel())[first % 8 :][: end - first]
    mask = bits.view(-1 if width else rows.stop - rows.start, *entry.shape[1:])
    return pack_bits(mask[(slice(None), *columns)].reshape(-1))


def _open_all(expected: TensorFiles) -> list[tuple[str, Any]]:
    """Every tensor's name and the open file that has it, checked by name, shape and dtype."""
    refuse(expected.unlisted())
    handles = [_open(file) for file in expected.files]
    for file, handle in zip(expected.files, handles, strict=True):
        refuse(expected.misfits(file, _described(handle)))
    refuse(expected.missing())
    return [(name, handle) for handle in handles for name in handle.keys()]  # noqa: SIM118


def _described(handle: Any) -> Iterator[tuple[str, torch.dtype | str, tuple[int, ...]]]:
    for name in handle.keys():  # noqa: SIM118 (a safetensors handle is no mapping)
        part = handle.get_slice(name)
        dtype = part.get_dtype()
        yield name, _SAFETENSORS_NAMES.get(dtype, dtype), tuple(part.get_shape())


def _open(file: Path) -> Any:
    try:
        return safe_open(file, framework="pt")
    except SafetensorError as error:
        raise CheckpointError(f"{file}: not a valid safetensors file ({error})") from None


def _read_private(
    directory: Path, manifest: Manifest, task: TaskEntry, like: Model
) -> dict[str, Tensor]:
    file = private_file(directory, manifest, task)
    if file is None:
        return {}
    handle = _open(file)
    tensors = {}
    for key in handle.keys():  # noqa: SIM118
        shape = tuple(handle.get_slice(key).get_shape())  # may be another for every task
        shard, device = None, torch.device("cpu")
        if key in like:
            place = check_tensor("like", key, like[key])
            device = local_part(place).device
            if place_shard := shard_of(f"like, tensor {key!r}", place):
                if place.dim() != len(shape):
                    raise ValueError(
                        f"like, private tensor {key!r}: shape {tuple(place.shape)}, but task "
                        f"{task.name!r} has {shape}"
                    )
                shard = shard_of_shape(shape, place_shard.mesh, place_shard.placements)
        part = _read_part(handle, key, shard).to(device, copy=True)
        tensors[key] = shard.wrap(part, shape) if shard else part
    return tensors
