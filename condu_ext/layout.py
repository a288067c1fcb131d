"""Where each tensor sits in an arena, and which elements belong together in a sum.

An arena is one flat allocation that holds the unified delta of many tensors, one after another,
each padded to ``ALIGN`` elements; a task's mask is a bit plane over the same elements (bit j of
the plane, natural little-endian order, belongs to element j). Inside an arena a tensor is stored
in *memory order*: a channels_last weight keeps its layout, and ``TensorSpec.order`` says which.

Sums are formed over chunks of ``CHUNK`` elements that never cross a tensor and are added in chunk
order, so a rescaler does not depend on threads, instruction set or the way a model is sharded.
These rules are those of csrc/condu_ext.h.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from condu_ext.sharding import ShardSpec

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

ALIGN = 512
CHUNK = 65536


def offsets(numels: Iterable[int]) -> tuple[list[int], int]:
    """First element of each tensor in an arena, and the arena's size in elements."""
    starts, end = [], 0
    for numel in numels:
        starts.append(end)
        end += (numel + ALIGN - 1) // ALIGN * ALIGN
    return starts, end


def chunk_count(numels: Iterable[int]) -> int:
    """Number of chunks of a list of tensors."""
    return sum((numel + CHUNK - 1) // CHUNK for numel in numels)


def memory_order(tensor: Tensor) -> tuple[int, ...]:
    """Dimensions from the slowest to the fastest in memory; the identity unless it is dense so."""
    identity = tuple(range(tensor.dim()))
    if tensor.is_contiguous():
        return identity
    order = tuple(sorted(identity, key=lambda dim: -tensor.stride()[dim]))
    return order if tensor.permute(order).is_contiguous() else identity


@dataclass(frozen=True)
class TensorSpec:
    """One fused tensor: its name, shape, memory order, and which part of it is here.

    ``via`` is the 16-bit dtype through which θ_0 is rounded before use (``match_dtype``), or None.
    ``shard`` is None for a plain tensor. Arenas and kernels have to do with the local part alone;
    the memory order is its order, the identity for every sharded tensor.
    """

    name: str
    shape: tuple[int, ...]
    order: tuple[int, ...]
    via: torch.dtype | None = None
    shard: ShardSpec | None = None

    @property
    def numel(self) -> int:
        """Elements of the whole tensor."""
        return math.prod(self.shape)

    @property
    def local_shape(self) -> tuple[int, ...]:
        return self.shard.shape if self.shard else self.shape

    @property
    def local_numel(self) -> int:
        return math.prod(self.local_shape)

    def flatten(self, local: Tensor) -> Tensor:
        """The elements of the local part in memory order, as a view if it is dense in it, else a
        copy."""
        return local.detach().permute(self.order).contiguous().view(-1)

    def is_view(self, local: Tensor) -> bool:
        """Whether :meth:`flatten` shares the tensor's memory."""
        return local.permute(self.order).is_contiguous()

    def unflatten(self, flat: Tensor) -> Tensor:
        """The local part whose elements in memory order are ``flat`` (a view)."""
        inverse = [self.order.index(dim) for dim in range(len(self.order))]
        return flat.view([self.local_shape[dim] for dim in self.order]).permute(inverse)

    def wrap(self, local: Tensor) -> Tensor:
        """The tensor of which ``local`` is the part here: a DTensor if it is sharded."""
        return self.shard.wrap(local, self.shape) if self.shard else local


@dataclass(frozen=True)
class ModelSpec:
    """What a state knows of the model that it belongs to.

    Attributes:
        tensors: the fused tensors, in the base model's order.
        aliases: name of a tied tensor → name under which it is fused.
        fixed: names of integer and bool entries, which must equal the base model's.
        private: patterns (fnmatch) of tensors that are stored whole for each task.
        private_names: the base model's tensors that match; every task must bring them.
        mesh: the device mesh of its sharded tensors, None if all are plain.
    """

    tensors: tuple[TensorSpec, ...]
    aliases: Mapping[str, str]
    fixed: frozenset[str]
    private: tuple[str, ...]
    private_names: frozenset[str]
    mesh: DeviceMesh | None = None

    @property
    def names(self) -> list[str]:
        """The names of the fused tensors, then those that are tied to them."""
        return [*(entry.name for entry in self.tensors), *self.aliases]

    def names_of(self, name: str) -> list[str]:
        """A fused tensor's own name and its aliases."""
        return [name, *(alias for alias, target in self.aliases.items() if target == name)]

    def with_ties(self, found: Iterable[Mapping[str, str]]) -> ModelSpec:
        """The spec with the ties that any process ``found``: a part without elements has no memory
        by which its process could tell.

        Raises:
            ValueError: tensors with elements here that are tied elsewhere only.
        """
        aliases = {alias: target for ties in found for alias, target in ties.items()}
        for entry in self.tensors:
            if entry.name in aliases and entry.local_numel:
                raise ValueError(
                    f"tensors {aliases[entry.name]!r} and {entry.name!r} are tied in another "
                    "process, but not here"
                )
        rest = tuple(entry for entry in self.tensors if entry.name not in aliases)
        return replace(self, tensors=rest, aliases=aliases)

    def claims(self) -> dict[str, object]:
        """What all processes that share the model must agree on, by what an error calls it; nothing
        without a mesh."""
        if self.mesh is None:
            return {}
        tensors = {
            f"tensor {t.name!r} (position, shape, memory order, rounding, placements)": (
                (position, t.shape, t.order, t.via, t.shard and t.shard.placements)
            )
            for position, t in enumerate(self.tensors)
        }
        return tensors | {
            "the tied tensors": dict(self.aliases),
            "the integer tensors": sorted(self.fixed),
            "the private tensors": (self.private, sorted(self.private_names)),
        }


@dataclass
class Arena:
    """The part of a state that lives on one device.

    Attributes:
        index: positions in ``ModelSpec.tensors`` of the tensors held here.
        numels: elements of each one's local part.
        u: unified delta, [size], fp32 or bf16.
        planes: per task a packed mask, uint8 [size / 8].
        num, den: Σ|d| and Σ M·|u| per task and whole tensor, float64 [tasks, tensors], on the CPU.
        rescaler: λ per task and tensor, float32 [tasks, tensors], on the arena's device.
    """

    index: tuple[int, ...]
    numels: tuple[int, ...]
    u: Tensor
    planes: list[Tensor]
    num: Tensor
    den: Tensor
    rescaler: Tensor

    @property
    def device(self) -> torch.device:
        return self.u.device

    @property
    def starts(self) -> list[int]:
        return offsets(self.numels)[0]

    @property
    def nbytes(self) -> int:
        tensors = [self.u, *self.planes, self.num, self.den, self.rescaler]
        return sum(t.numel() * t.element_size() for t in tensors)


def empty_arena(
    index: Sequence[int], numels: Sequence[int], dtype: torch.dtype, device: torch.device
) -> Arena:
    """An arena without tasks: a unified delta of zeros."""
    return Arena(
        index=tuple(index),
        numels=tuple(numels),
        u=torch.zeros(offsets(numels)[1], dtype=dtype, device=device),
        planes=[],
        num=torch.zeros(0, len(index), dtype=torch.float64, device="cpu"),
        den=torch.zeros(0, len(index), dtype=torch.float64, device="cpu"),
        rescaler=torch.zeros(0, len(index), dtype=torch.float32, device=device),
    )


def group_by_device(devices: Sequence[torch.device]) -> dict[torch.device, list[int]]:
    """Positions of the tensors on each device, devices in order of appearance."""
    groups: dict[torch.device, list[int]] = {}
    for k, device in enumerate(devices):
        groups.setdefault(device, []).append(k)
    return groups
