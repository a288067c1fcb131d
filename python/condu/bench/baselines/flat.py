"""A model as one flat vector, and the groups of elements that eager PyTorch works on.

A group is as many elements as give the device enough to do at a time: on a CPU so few that every
temporary stays in the cache, on a GPU so many that launching costs little. It may hold many small
tensors or a part of a large one.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

import condu_ext as cx
from condu.bench.baselines.base import Triggered, Weights, norms_and_rescalers
from condu.bench.shapes import Shapes

GROUP = {"cpu": 1 << 16, "cuda": 1 << 24}


@dataclass
class FlatState(Triggered):
    """A state whose tensors are views of one vector of values and one bool matrix of masks."""

    values: Tensor  # [n]
    bits: Tensor  # bool [tasks, n]

    @classmethod
    def empty(
        cls, shapes: Shapes, tasks: int, dtype: torch.dtype, device: torch.device
    ) -> FlatState:
        size = sum(math.prod(shape) for shape in shapes.values())
        values = torch.empty(size, dtype=dtype, device=device)
        bits = torch.empty(tasks, size, dtype=torch.bool, device=device)
        masks = [_named(row, shapes) for row in bits]
        return cls(_named(values, shapes), masks, [], [], values, bits)

    @classmethod
    def of(cls, state: cx.UnifiedDelta) -> FlatState:
        """A copy of a state."""
        delta = state.delta
        first = next(iter(delta.values()))
        flat = cls.empty(shapes_of(delta), len(state.tasks), first.dtype, first.device)
        _copy(delta, flat.delta)
        for task, target in zip(state.tasks, flat.masks, strict=True):
            _copy(state.mask(task), target)
        flat.norms, flat.rescalers = norms_and_rescalers(state, flat.masks)
        return flat


def _copy(source: Weights, target: Weights) -> None:
    for name, tensor in source.items():
        target[name].copy_(tensor)


def shapes_of(model: Weights) -> Shapes:
    """Shape of each tensor."""
    return {name: tuple(tensor.shape) for name, tensor in model.items()}


def _named(flat: Tensor, shapes: Shapes) -> dict[str, Tensor]:
    sizes = [math.prod(shape) for shape in shapes.values()]
    parts = flat.split(sizes)
    return {name: part.view(shapes[name]) for name, part in zip(shapes, parts, strict=True)}


@dataclass
class Group:
    """Elements ``part`` of the flat model: per tensor that it touches, which of its elements."""

    part: slice
    pieces: list[tuple[str, slice]]

    @property
    def size(self) -> int:
        return self.part.stop - self.part.start

    def of(self, model: Mapping[str, Tensor]) -> list[Tensor]:
        """The group's elements of a model by name: flat views, tensor by tensor."""
        return [model[name].view(-1)[piece] for name, piece in self.pieces]

    def views(self, values: Tensor) -> list[Tensor]:
        """The same cuts of a vector with one value for each element of the group."""
        return list(values.split([piece.stop - piece.start for _, piece in self.pieces]))


def groups(shapes: Shapes, device: torch.device) -> Iterator[Group]:
    """The model in order, in groups of :data:`GROUP` elements; the last may be smaller."""
    limit = GROUP[device.type]
    start = filled = 0
    pieces: list[tuple[str, slice]] = []
    for name, shape in shapes.items():
        numel, taken = math.prod(shape), 0
        while taken < numel:
            count = min(numel - taken, limit - filled)
            pieces.append((name, slice(taken, taken + count)))
            taken, filled = taken + count, filled + count
            if filled == limit:
                yield Group(slice(start, start + filled), pieces)
                start, filled, pieces = start + filled, 0, []
    if pieces:
        yield Group(slice(start, start + filled), pieces)
