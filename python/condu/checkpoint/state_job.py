"""The job that writes a state: where the results of units go, whatever fused them."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import torch
from torch import Tensor

from condu.checkpoint.fusing import Fusion, Part
from condu.checkpoint.job import Outcome
from condu.checkpoint.room import Room
from condu.checkpoint.target import NewFile
from condu.checkpoint.tensor_files import as_bytes, new_header
from condu.checkpoint.units import Unit
from condu_ext import ranges
from condu_ext.layout import ModelSpec
from condu_ext.ranges import StateRange
from condu_ext.rescale import check_finite
from condu_ext.rule import FusionRule
from condu_ext.storage import shards_of


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
        self._layout = lru_cache(maxsize=4)(self._new_layout)
        self._lock = threading.Lock()  # so that no two workers make the same

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
        out = room.state(numels, tasks, self.dtype)
        sums = self.fusion.fuse(unit, inputs, out, self.rule)
        self._check_values(unit, sums)
        decided = [0] * len(numels)
        if tasks > 1:  # one task's sum is zero only where it did not move
            other = room.state(numels, tasks, self.dtype)
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
        order = sorted(range(len(totals)), key=lambda row: row not in self.fusion.newcomers)
        check_finite(totals[order], [self.fusion.rows[row] for row in order], names)

    def _written(
        self, unit: Unit, out: StateRange, generation: int
    ) -> list[tuple[str, int, memoryview]]:
        """One piece for each file: in a file a unit's tensors lie one behind the other. ``out`` is
        used up."""
        layout, first = self.layout(unit.shard), unit.segments[0]
        size = self.dtype.itemsize
        elements = [slice(at * size, (at + s.numel) * size) for s, at in unit.placed]
        bits = [segment.bits(at) for segment, at in unit.placed]
        unified, *triggers = self._names_of(unit.shard, generation)
        places = layout.unified.places, layout.triggers.places
        offset, packed_offset = (place[first.tensor] for place in places)
        start = offset + first.start * size
        written = [(unified, start, joined(as_bytes(out.u), elements))]
        start = packed_offset + first.start // 8
        for name, plane in zip(triggers, out.planes, strict=True):
            written.append((name, start, joined(as_bytes(plane), bits)))
        return written

    def layout(self, shard: int) -> Layout:
        """How the files of a shard look; those of all triggers look alike."""
        with self._lock:
            return self._layout(shard)

    def _new_layout(self, shard: int) -> Layout:
        tensors = self.shards[shard]
        entries = [self.spec.tensors[k] for k in tensors]
        whole = [(e.name, self.dtype, e.shape) for e in entries]
        packed = [(e.name, torch.uint8, ((e.numel + 7) // 8,)) for e in entries]
        return Layout(_form(tensors, whole), _form(tensors, packed))

    def _names_of(self, shard: int, generation: int) -> list[str]:
        """That of the unified delta's file, then the triggers' in the order of their tasks."""
        label = f"{shard + 1:05}-of-{len(self.shards):05}.safetensors"
        triggers = [f"triggers-{generation}-{t}-{label}" for t in range(len(self.fusion.tasks))]
        return [f"unified-{generation}-{label}", *triggers]

    def files(self, shard: int, generation: int) -> list[NewFile]:
        layout = self.layout(shard)
        unified, *triggers = self._names_of(shard, generation)
        found = [NewFile(unified, layout.unified.header, layout.unified.size)]
        form = layout.triggers
        return found + [NewFile(name, form.header, form.size) for name in triggers]

    def trigger_files(self, shard: int, generation: int) -> list[str]:
        """Names of a shard's files of triggers, in the order of the tasks."""
        return self._names_of(shard, generation)[1:]


@dataclass(frozen=True)
class Form:
    """How a file looks: its first bytes, the byte at which each tensor begins, its size."""

    header: bytes
    places: Mapping[int, int]
    size: int


@dataclass(frozen=True)
class Layout:
    """How the files of a shard look."""

    unified: Form
    triggers: Form


def _form(
    tensors: Sequence[int], contents: Sequence[tuple[str, torch.dtype, tuple[int, ...]]]
) -> Form:
    header, stored, size = new_header(Path(), contents)
    offsets = (place.offset for place in stored.values())
    return Form(header, dict(zip(tensors, offsets, strict=True)), size)


def joined(memory: memoryview, pieces: Sequence[slice]) -> memoryview:
    """Pieces of some memory, of which the first is at its start, moved one behind the other."""
    end = 0
    for piece in pieces:
        start, end = end, end + piece.stop - piece.start
        if start != piece.start:
            memory[start:end] = memory[piece]  # downwards, and safe where they overlap
    return memory[:end]
