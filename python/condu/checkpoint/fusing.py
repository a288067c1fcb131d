"""Unify, absorb and merge over ranges: the jobs that write a state.

The three differ in what a unit reads and which kernel it calls (:class:`Fusion`); where the results
go, and how a state's ``config.json`` follows from all sums, is the same (:class:`StateJob`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from condu.checkpoint.inputs import ModelRanges, Models
from condu.checkpoint.job import Outcome
from condu.checkpoint.room import Room
from condu.checkpoint.state_files import StateFiles
from condu.checkpoint.target import NewFile
from condu.checkpoint.tensor_files import as_bytes, new_header
from condu.checkpoint.units import Unit
from condu_ext import ranges
from condu_ext.layout import ModelSpec, offsets
from condu_ext.ranges import StateRange
from condu_ext.rescale import check_finite
from condu_ext.rule import FusionRule
from condu_ext.storage import shards_of


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
        rows: task of each row of the kernel's chunk sums, those first that may be at fault.
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

    @property
    def rows(self) -> Sequence[str]:
        return [*self.tasks, *self.tasks]

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

    @property
    def rows(self) -> Sequence[str]:
        return [*self.tasks, self.tasks[-1]]

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

    @property
    def rows(self) -> Sequence[str]:
        return self.tasks

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


class StateJob:
    """A :class:`condu.checkpoint.job.Job` that writes unified delta and triggers."""

    def __init__(
        self,
        spec: ModelSpec,
        fusion: Fusion,
        rule: FusionRule,
        dtype: torch.dtype,
        expect_base: Callable[[str, str], None] = lambda name, digits: None,
    ) -> None:
        """``expect_base``: raises ValueError if a tensor of the base has a wrong fingerprint."""
        self.spec, self.fusion, self.rule, self.dtype = spec, fusion, rule, dtype
        self._expect_base = expect_base
        self.names = [entry.name for entry in spec.tensors]
        self.numels = [entry.numel for entry in spec.tensors]
        self.shards = shards_of(self.numels, dtype)
        self.reads = fusion.reads
        # a second state in memory counts the elements that the rule for total = 0 decides
        self.element_bytes = fusion.element_bytes + 2 * (dtype.itemsize + len(fusion.tasks) / 8) + 2
        self.chunk_rows = len(fusion.rows)
        self.has_base = fusion.models is not None
        self.files = lru_cache(maxsize=8)(self._files)
        self.places = lru_cache(maxsize=8)(self._new_places)

    def bytes_with(self, dtype: torch.dtype) -> int:
        """About how many bytes would be written with another state dtype."""
        bits = len(self.fusion.tasks) / 8
        return int(sum(self.numels) * (dtype.itemsize + bits))

    def read(self, unit: Unit, room: Room) -> Part:
        return self.fusion.read(unit, room)

    def fuse(self, unit: Unit, inputs: Part, room: Room, generation: int) -> Outcome:
        numels, tasks = unit.numels, len(self.fusion.tasks)
        if not numels:
            return Outcome([], sums=torch.zeros(self.chunk_rows, 0, dtype=torch.float64))
        out, other = (room.state(numels, tasks, self.dtype) for _ in range(2))
        sums = self.fusion.fuse(unit, inputs, out, self.rule)
        self._check_values(unit, sums)
        self.fusion.fuse(unit, inputs, other, ranges.opposite(self.rule))
        decided = ranges.zero_sums(out, other, numels).tolist()
        base = [as_bytes(t) for t in inputs.models.theta_0] if inputs.models else []
        return Outcome(self._written(unit, out, generation), base, sums, decided)

    def check_base(self, tensor: int, digits: str) -> None:
        self._expect_base(self.names[tensor], digits)

    def base_fingerprint(self, tensor: int) -> str:
        assert self.fusion.models is not None
        return self.fusion.models.fingerprint(tensor)

    def _check_values(self, unit: Unit, sums: Tensor) -> None:
        if sums.isfinite().all():
            return
        names = [self.names[segment.tensor] for segment in unit.segments]
        totals = ranges.add_chunks(unit.numels, sums)
        # the new task's own sum tells whose fault it is; NaN reaches the others' sums as well
        order = sorted(range(len(totals)), key=lambda r: -self._is_num(r))
        check_finite(totals[order], [self.fusion.rows[r] for r in order], names)

    def _is_num(self, row: int) -> bool:
        if isinstance(self.fusion, Unifying):
            return row < len(self.fusion.tasks)
        return row == len(self.fusion.tasks)

    def _written(
        self, unit: Unit, out: StateRange, generation: int
    ) -> list[tuple[str, int, memoryview]]:
        unified, *triggers = self.places(unit.shard, generation)
        written = []
        for segment, start in zip(unit.segments, offsets(unit.numels)[0], strict=True):
            name = self.names[segment.tensor]
            place = unified[name]
            written.append(
                (
                    place.file.name,
                    place.offset + segment.start * self.dtype.itemsize,
                    as_bytes(out.u[start : start + segment.numel]),
                )
            )
            bits = slice(start // 8, start // 8 + (segment.numel + 7) // 8)
            for places, plane in zip(triggers, out.planes, strict=True):
                place = places[name]
                written.append(
                    (place.file.name, place.offset + segment.start // 8, as_bytes(plane[bits]))
                )
        return written

    def _headers(self, shard: int, generation: int) -> list[tuple[Any, ...]]:
        """Per file its name and what :func:`new_header` makes of it."""
        label = f"{shard + 1:05}-of-{len(self.shards):05}.safetensors"
        entries = [self.spec.tensors[k] for k in self.shards[shard]]
        names = [f"unified-{generation}-{label}"]
        names += [f"triggers-{generation}-{t}-{label}" for t in range(len(self.fusion.tasks))]
        whole = [(e.name, self.dtype, e.shape) for e in entries]
        packed = [(e.name, torch.uint8, ((e.numel + 7) // 8,)) for e in entries]
        contents: list[Sequence[tuple[str, torch.dtype, tuple[int, ...]]]]
        contents = [whole, *([packed] * len(self.fusion.tasks))]
        return [(n, *new_header(Path(n), c)) for n, c in zip(names, contents, strict=True)]

    def _files(self, shard: int, generation: int) -> list[NewFile]:
        return [
            NewFile(name, header, size)
            for name, header, _, size in self._headers(shard, generation)
        ]

    def _new_places(self, shard: int, generation: int) -> list[dict[str, Any]]:
        return [places for _, _, places, _ in self._headers(shard, generation)]


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
    for segment, at in zip(unit.segments, offsets(unit.numels)[0], strict=True):
        tensor = segment.tensor if order is None else order[segment.tensor]
        where = (tensor, segment.start, segment.stop)
        state.read_delta(*where, part.u[at : at + segment.numel])
        for task, plane in enumerate(part.planes):
            bits = slice(at // 8, at // 8 + (segment.numel + 7) // 8)
            state.read_bits(task, *where, plane[bits])
    return part
