"""The job that writes a state: where the results of units go, whatever fused them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache
from pathlib import Path

import torch
from torch import Tensor

from condu.checkpoint.fusing import Fusion, Part
from condu.checkpoint.job import Outcome
from condu.checkpoint.room import Room
from condu.checkpoint.target import NewFile
from condu.checkpoint.tensor_files import StoredTensor, as_bytes, new_header
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
        unified, *triggers = self.places(unit.shard, generation)
        written = []
        for segment, start in unit.placed:
            name = self.names[segment.tensor]
            place = unified[name]
            written.append(
                (
                    place.file.name,
                    place.offset + segment.start * self.dtype.itemsize,
                    as_bytes(out.u[start : start + segment.numel]),
                )
            )
            bits = segment.bits(start)
            for places, plane in zip(triggers, out.planes, strict=True):
                place = places[name]
                written.append(
                    (place.file.name, place.offset + segment.start // 8, as_bytes(plane[bits]))
                )
        return written

    def _headers(
        self, shard: int, generation: int
    ) -> list[tuple[str, bytes, dict[str, StoredTensor], int]]:
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

    def _new_places(self, shard: int, generation: int) -> list[dict[str, StoredTensor]]:
        return [places for _, _, places, _ in self._headers(shard, generation)]
