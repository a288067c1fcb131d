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
from dataclasses import dataclass

import torch
from torch import Tensor

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
    """One fused tensor: its name, shape and memory order.

    ``via`` is the 16-bit dtype through which θ_0 is rounded before use (``match_dtype``), or None.
    """

    name: str
    shape: tuple[int, ...]
    order: tuple[int, ...]
    via: torch.dtype | None = None

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    def flatten(self, tensor: Tensor) -> Tensor:
        """The elements in memory order, as a view if the tensor is dense in it, else a copy."""
        return tensor.detach().permute(self.order).contiguous().view(-1)

    def is_view(self, tensor: Tensor) -> bool:
        """Whether :meth:`flatten` shares the tensor's memory."""
        return tensor.permute(self.order).is_contiguous()

    def unflatten(self, flat: Tensor) -> Tensor:
        """The tensor of this shape whose elements in memory order are ``flat`` (a view)."""
        inverse = [self.order.index(dim) for dim in range(len(self.order))]
        return flat.view([self.shape[dim] for dim in self.order]).permute(inverse)


@dataclass(frozen=True)
class ModelSpec:
    """What a state knows of the model that it belongs to.

    Attributes:
        tensors: the fused tensors, in the base model's order.
        aliases: name of a tied tensor → name under which it is fused.
        fixed: names of integer and bool entries, which must equal the base model's.
        private: patterns (fnmatch) of tensors that are stored whole for each task.
        private_names: the base model's tensors that match; every task must bring them.
    """

    tensors: tuple[TensorSpec, ...]
    aliases: Mapping[str, str]
    fixed: frozenset[str]
    private: tuple[str, ...]
    private_names: frozenset[str]

    def names_of(self, name: str) -> list[str]:
        """A fused tensor's own name and its aliases."""
        return [name, *(alias for alias, target in self.aliases.items() if target == name)]


@dataclass
class Arena:
    """The part of a state that lives on one device.

    Attributes:
        index: positions in ``ModelSpec.tensors`` of the tensors held here.
        u: unified delta, [size], fp32 or bf16.
        planes: per task a packed mask, uint8 [size / 8].
        num, den: Σ|d| and Σ M·|u| per task and tensor, float64 [tasks, tensors], on the CPU.
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
