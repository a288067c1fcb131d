"""Tensors that are spread over processes: ``torch.distributed.tensor.DTensor``, as of FSDP2.

A process fuses the elements that it holds, its *shard*; which ones those are follows from the
placements alone, never from values. On a mesh dimension over which a tensor is replicated every
process has the same elements: all of them compute, the one with coordinate 0 counts. A plain tensor
beside sharded ones is taken as replicated over the whole mesh.
"""

from __future__ import annotations

import functools
import math
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.tensor import DTensor, Placement
    from typing_extensions import TypeIs


def is_sharded(tensor: object) -> TypeIs[DTensor]:
    """Whether it is a DTensor, of any placement. Imports nothing: whoever has a DTensor has already
    imported the module."""
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(tensor, module.DTensor)


def local_part(tensor: Tensor) -> Tensor:
    """What this process holds of a tensor: a plain tensor that shares its memory."""
    return tensor.to_local().detach() if is_sharded(tensor) else tensor


def has_copies(tensor: Tensor) -> bool:
    """Whether processes of the mesh hold the same elements: plain, or replicated over some."""
    return not is_sharded(tensor) or any(p.is_replicate() for p in tensor.placements)


def mesh_of(*models: object) -> DeviceMesh | None:
    """The device mesh of the first sharded tensor; None if all are plain. Never raises, so that
    every process knows with whom to talk before it finds fault with its arguments."""
    for model in models:
        for tensor in model.values() if isinstance(model, Mapping) else ():
            if is_sharded(tensor):
                return tensor.device_mesh
    return None


def refuse_sharded(who: str, model: object) -> None:
    """TypeError naming the first sharded tensor, for what works on whole tensors only."""
    for name, tensor in model.items() if isinstance(model, Mapping) else ():
        if is_sharded(tensor):
            raise TypeError(f"{who}, tensor {name!r}: is sharded (DTensor); give whole tensors")


def refuse_foreign_shards(where: str, name: str, tensor: Tensor) -> None:
    """TypeError for the shards of ZeRO-3 and FSDP1, which are plain tensors of other shapes than
    the model's; ``where`` begins the message."""
    expected = getattr(tensor, "ds_shape", None)
    if expected is not None and tuple(tensor.shape) != tuple(expected):
        raise TypeError(
            f"{where}: is ZeRO-3's placeholder of shape {tuple(tensor.shape)} for a tensor of shape"
            f" {tuple(expected)}; call this inside deepspeed.zero.GatheredParameters"
        )
    if getattr(tensor, "_is_flat_param", False) or "_fsdp_wrapped_module" in name.split("."):
        raise TypeError(
            f"{where}: is a flattened shard of FullyShardedDataParallel (FSDP1); shard with "
            "torch.distributed.fsdp.fully_shard (FSDP2), or call this inside summon_full_params"
        )


@dataclass(frozen=True)
class ShardSpec:
    """This process's part of a tensor.

    Attributes:
        mesh, placements: those of the DTensor.
        shape: of the part; it may hold no element.
        offset: index of the part's first element in the whole tensor.
    """

    mesh: DeviceMesh
    placements: tuple[Placement, ...]
    shape: tuple[int, ...]
    offset: tuple[int, ...]

    @property
    def owned(self) -> bool:
        """Whether this process is the one that counts these elements."""
        coordinates = self.mesh.get_coordinate() or ()
        return all(
            c == 0 or not p.is_replicate()
            for c, p in zip(coordinates, self.placements, strict=True)
        )

    @property
    def slices(self) -> tuple[slice, ...]:
        """The part, as an index into the whole tensor."""
        return tuple(slice(o, o + n) for o, n in zip(self.offset, self.shape, strict=True))

    def wrap(self, local: Tensor, shape: tuple[int, ...]) -> Tensor:
        """The tensor of global ``shape`` whose part here is ``local`` (shares its memory)."""
        from torch.distributed.tensor import DTensor

        stride = [math.prod(shape[dim + 1 :]) for dim in range(len(shape))]
        return DTensor.from_local(
            local,
            self.mesh,
            self.placements,
            run_check=False,
            shape=torch.Size(shape),
            stride=tuple(stride),
        )

    def __str__(self) -> str:
        return f"{_names(self.placements)} on {self.mesh}"


def _names(placements: Iterable[Placement]) -> str:
    return "(" + ", ".join(map(repr, placements)) + ")"


def shard_of(where: str, tensor: Tensor) -> ShardSpec | None:
    """Which part of a tensor is here; None for a plain tensor.

    Raises:
        TypeError: a placement other than Shard and Replicate, such as the pending sum of Partial,
            or a part whose shape is not what the placements say; ``where`` begins the message.
    """
    if not is_sharded(tensor):
        return None
    from torch.distributed.tensor import Replicate, Shard

    placements = tuple(tensor.placements)
    if any(type(p) not in (Shard, Replicate) for p in placements):
        raise TypeError(
            f"{where}: placed as {_names(placements)}; only Shard and Replicate can be fused"
        )
    shard = shard_of_shape(tensor.shape, tensor.device_mesh, placements)
    if shard.shape != tuple(tensor.to_local().shape):
        raise TypeError(
            f"{where}: its part here is {tuple(tensor.to_local().shape)}, but {tuple(tensor.shape)}"
            f" placed as {_names(placements)} has {shard.shape} here"
        )
    return shard


def shard_of_shape(
    shape: Sequence[int], mesh: DeviceMesh, placements: Iterable[Placement]
) -> ShardSpec:
    """Which part of a tensor of this shape is here."""
    placements, coordinates = tuple(placements), tuple(mesh.get_coordinate() or ())
    return ShardSpec(
        mesh, placements, *_part_and_offset(tuple(shape), mesh, placements, coordinates)
    )


@functools.lru_cache(maxsize=1 << 14)  # asked for every tensor of every model of a call
def _part_and_offset(
    shape: tuple[int, ...],
    mesh: DeviceMesh,
    placements: tuple[Placement, ...],
    coordinates: tuple[int, ...],
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Shape and first index of the part of the process that has these coordinates in the mesh."""
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    part, offset = compute_local_shape_and_global_offset(torch.Size(shape), mesh, placements)
    return tuple(part), tuple(offset)


def whole(tensor: Tensor) -> Tensor:
    """The whole tensor, on every process of its mesh. Collective for a sharded one, whose parts are
    sent from the mesh's kind of device, also where they are kept elsewhere."""
    if not is_sharded(tensor):
        return tensor
    return cast("DTensor", tensor.to(tensor.device_mesh.device_type)).full_tensor()


def place_in(mesh: DeviceMesh | None) -> int:
    """Number of this process in row-major order of the mesh; 0 without a mesh."""
    place = 0
    if mesh is not None:
        for coordinate, size in zip(mesh.get_coordinate() or (), mesh.shape, strict=True):
            place = place * size + coordinate
    return place


def leads(mesh: DeviceMesh | None) -> bool:
    """Whether this process counts and writes what all have: the first of the mesh, or the only."""
    return place_in(mesh) == 0
