"""Unify, absorb and merge over ranges: what a unit reads, and which kernel it calls.

Where the results go is the same for the three (:mod:`.state_job`), and so is how a state's
``config.json`` follows from all sums (:mod:`.committing`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from condu.checkpoint.inputs import ModelRanges, Models
from condu.checkpoint.room import Room
from condu.checkpoint.state_files import StateFiles
from condu.checkpoint.units import Unit
from condu_ext import ranges
from condu_ext.ranges import StateRange
from condu_ext.rule import FusionRule


@dataclass(frozen=True)
class Part:
    """A unit's inputs: models, or ranges of one or two states, or both."""

    models: ModelRanges | None
    states: list[StateRange]


class Fusion(Protocol):
    """How a state comes about.

    Attributes:
        tasks: names of the new state's tasks.
        reads: bytes to read.
        element_bytes: memory for an element of the inputs.
        rows: task of each row of the kernel's chunk sums.
        newcomers: the rows that are Σ|d| of fine-tuned models.
        models: the base and the fine-tuned models, if there are any.
    """

    @property
    def tasks(self) -> Sequence[str]: ...
    @property
    def reads(self) -> int: ...
    @property
    def element_bytes(self) -> float: ...
    @property
    def models(self) -> Models | None: ...
    @property
    def rows(self) -> Sequence[str]: ...
    @property
    def newcomers(self) -> range: ...

    def read(self, unit: Unit, room: Room) -> Part: ...

    def fuse(self, unit: Unit, part: Part, out: StateRange, rule: FusionRule) -> Tensor:
        """The kernel's chunk sums, float64 [rows, chunks]."""

    def tables(self, sums: Tensor) -> tuple[Tensor, Tensor]:
        """num and den of the new state's tasks, float64 [tasks, tensors], from its rows of sums."""


class Unifying:
    """T fine-tuned models and their base."""

    def __init__(self, tasks: Sequence[str], models: Models, device: torch.device) -> None:
        self.tasks, self.models, self._device = tasks, models, device
        self.reads, self.element_bytes = models.reads, models.element_bytes
        self.rows, self.newcomers = [*tasks, *tasks], range(len(tasks))

    def read(self, unit: Unit, room: Room) -> Part:
        return Part(self.models.read(unit, room), [])

    def fuse(self, unit: Unit, part: Part, out: StateRange, rule: FusionRule) -> Tensor:
        assert part.models is not None
        given = part.models
        return ranges.unify(
            given.models, given.base, out, rule=rule, via=given.via, device=self._device
        )

    def tables(self, sums: Tensor) -> tuple[Tensor, Tensor]:
        return sums[: len(self.tasks)], sums[len(self.tasks) :]


class Absorbing:
    """A state, one more fine-tuned model, and their base."""

    def __init__(self, old: StateFiles, task: str, models: Models, device: torch.device) -> None:
        self._old, self.models, self._device = old, models, device
        self.tasks = [*(entry.name for entry in old.manifest.tasks), task]
        self.reads = models.reads + old.data_bytes
        self.element_bytes = models.element_bytes + element_bytes_of(old)
        self.rows = [*self.tasks, task]
        self.newcomers = range(len(self.tasks), len(self.rows))

    def read(self, unit: Unit, room: Room) -> Part:
        return Part(self.models.read(unit, room), [read_range(self._old, unit, room)])

    def fuse(self, unit: Unit, part: Part, out: StateRange, rule: FusionRule) -> Tensor:
        assert part.models is not None
        given = part.models
        return ranges.absorb(
            part.states[0],
            rescalers_of(self._old, unit),
            given.models[0],
            given.base,
            out,
            rule=rule,
            via=given.via,
            device=self._device,
        )

    def tables(self, sums: Tensor) -> tuple[Tensor, Tensor]:
        return torch.cat([num_of(self._old), sums[-1:]]), sums[:-1]


class Merging:
    """Two states over one base."""

    models = None

    def __init__(self, a: StateFiles, b: StateFiles, order: Sequence[int], device: torch.device):
        """``order``: for each tensor of ``a`` its position in ``b``."""
        self._a, self._b, self._order, self._device = a, b, order, device
        self.tasks = [entry.name for state in (a, b) for entry in state.manifest.tasks]
        self.reads = a.data_bytes + b.data_bytes
        self.element_bytes = element_bytes_of(a) + element_bytes_of(b)
        self.rows, self.newcomers = self.tasks, range(0)

    def read(self, unit: Unit, room: Room) -> Part:
        left = read_range(self._a, unit, room)
        return Part(None, [left, read_range(self._b, unit, room, self._order)])

    def fuse(self, unit: Unit, part: Part, out: StateRange, rule: FusionRule) -> Tensor:
        left, right = part.states
        return ranges.merge(
            left,
            rescalers_of(self._a, unit),
            right,
            rescalers_of(self._b, unit, self._order),
            unit.numels,
            out,
            rule=rule,
            device=self._device,
        )

    def tables(self, sums: Tensor) -> tuple[Tensor, Tensor]:
        right = num_of(self._b)[:, list(self._order)]
        return torch.cat([num_of(self._a), right]), sums


def element_bytes_of(state: StateFiles) -> float:
    """Memory for an element of a state."""
    return state.manifest.dtype.itemsize + len(state.manifest.tasks) / 8


def num_of(state: StateFiles) -> Tensor:
    """Σ|d|, float64 [tasks, tensors]."""
    rows = [task.num for task in state.manifest.tasks]
    shape = len(rows), len(state.manifest.spec.tensors)
    return torch.tensor(rows, dtype=torch.float64).view(shape)


def rescalers_of(state: StateFiles, unit: Unit, order: Sequence[int] | None = None) -> Tensor:
    """λ of a unit's segments, float32 [tasks, segments]; ``order`` as in :func:`read_range`."""
    positions = [s.tensor if order is None else order[s.tensor] for s in unit.segments]
    return state.rescaler[:, positions].contiguous()


def read_range(
    state: StateFiles, unit: Unit, room: Room, order: Sequence[int] | None = None
) -> StateRange:
    """A unit's part of a state, whose tensors are in another order where ``order`` is given."""
    tasks = len(state.manifest.tasks)
    part = room.state(unit.numels, tasks, state.manifest.dtype)
    for plane in part.planes:
        plane.zero_()
    for segment, at in unit.placed:
        tensor = segment.tensor if order is None else order[segment.tensor]
        where = (tensor, segment.start, segment.stop)
        state.read_delta(*where, part.u[at : at + segment.numel])
        for task, plane in enumerate(part.planes):
            state.read_bits(task, *where, plane[segment.bits(at)])
    return part
