"""A task's expert as a model folder: the base's files with the expert's values, and everything else
of the base's folder (configuration, tokenizer, processor) as it is.

    θ̃ = θ_0 + λ·(M ⊙ u), in θ_0's dtypes, as :func:`condu_ext.decouple`
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
import xxhash
from torch import Tensor

from condu.checkpoint.fingerprints import source_fingerprint
from condu.checkpoint.job import Outcome
from condu.checkpoint.options import Report
from condu.checkpoint.room import Room
from condu.checkpoint.safetensors_source import SafetensorsSource
from condu.checkpoint.sources import Source, Stored
from condu.checkpoint.state_files import StateFiles
from condu.checkpoint.target import NewFile
from condu.checkpoint.tensor_files import StoredTensor, as_bytes, new_header
from condu.checkpoint.units import Segment, Unit
from condu_ext import ranges
from condu_ext.layout import offsets
from condu_ext.ranges import StateRange

SINGLE = "model.safetensors"
"""The name under which from_pretrained looks for weights in one file."""
FILE_BYTES = 5 << 30
"""About the size of an output file where the base's files do not say: that of transformers."""


@dataclass(frozen=True)
class Entry:
    """A tensor of the model to write.

    Attributes:
        stored: its name, dtype and shape.
        fused: its position in the state, or None if it is copied.
        private: whether it is copied from the task's private tensors, not from the base.
    """

    stored: Stored
    fused: int | None = None
    private: bool = False


@dataclass(frozen=True)
class _Part:
    """A unit's inputs, per segment: the stored values, and what of the state is for the fused."""

    values: list[Tensor]
    expert: StateRange | None
    fused: list[int]


class ExtractJob:
    """A :class:`condu.checkpoint.job.Job` that writes a model."""

    chunk_rows = 0
    has_base = True

    def __init__(self, state: StateFiles, task: int, base: Source, device: torch.device) -> None:
        self._state, self._task, self._base, self._device = state, task, base, device
        self._known = state.manifest.base_fingerprints
        groups = _groups(base)
        self._file_names = list(groups)
        self.entries, self.shards = _entries(state, task, base, list(groups.values()))
        self.numels = [entry.stored.numel for entry in self.entries]
        bits = sum(e.stored.numel for e in self.entries if e.fused is not None)
        delta = bits * state.manifest.dtype.itemsize
        self.reads = sum(e.stored.nbytes for e in self.entries) + delta + bits // 8
        widest = max(entry.stored.dtype.itemsize for entry in self.entries)
        self.element_bytes = 2 * widest + state.manifest.dtype.itemsize + 1 / 8
        self._places = lru_cache(maxsize=8)(self._new_places)

    def read(self, unit: Unit, room: Room) -> _Part:
        values, fused = [], []
        for number, segment in enumerate(unit.segments):
            entry = self.entries[segment.tensor]
            out = room.take(segment.numel, entry.stored.dtype)
            where = entry.stored.name, segment.start, segment.stop, out
            if entry.private:
                self._state.read_private(self._task, *where)
            else:
                self._base.read(*where)
            values.append(out)
            if entry.fused is not None:
                fused.append(number)
        if not fused:
            return _Part(values, None, [])
        numels = [unit.segments[n].numel for n in fused]
        expert = room.state(numels, 1, self._state.manifest.dtype)
        expert.planes[0].zero_()
        for n, at in zip(fused, offsets(numels)[0], strict=True):
            segment = unit.segments[n]
            position = self.entries[segment.tensor].fused
            assert position is not None
            place = position, segment.start, segment.stop
            self._state.read_delta(*place, expert.u[at : at + segment.numel])
            self._state.read_bits(self._task, *place, expert.planes[0][segment.bits(at)])
        return _Part(values, expert, fused)

    def fuse(self, unit: Unit, inputs: _Part, room: Room, generation: int) -> Outcome:
        written = list(inputs.values)
        if inputs.expert is not None:
            base = [inputs.values[n] for n in inputs.fused]
            out = [room.take(t.numel(), t.dtype) for t in base]
            positions = [self._position(unit.segments[n]) for n in inputs.fused]
            ranges.decouple(
                inputs.expert,
                self._state.rescaler[self._task : self._task + 1, positions].contiguous(),
                base,
                out,
                via=[self._state.manifest.spec.tensors[k].via for k in positions],
                device=self._device,
            )
            for n, values in zip(inputs.fused, out, strict=True):
                written[n] = values
        places = self._places(unit.shard)
        pieces = []
        for segment, values in zip(unit.segments, written, strict=True):
            place = places[self.entries[segment.tensor].stored.name]
            offset = place.offset + segment.start * place.dtype.itemsize
            pieces.append((place.file.name, offset, as_bytes(values)))
        return Outcome(pieces, base=[as_bytes(values) for values in inputs.values])

    def check_base(self, tensor: int, digits: str) -> None:
        entry = self.entries[tensor]
        if entry.fused is None:
            return
        name = self._state.manifest.spec.tensors[entry.fused].name
        if self._known.get(name, digits) != digits:
            raise ValueError(
                f"{self._base.where}, tensor {entry.stored.name!r}: differs from the base model "
                "that the state was made over"
            )

    def base_fingerprint(self, tensor: int) -> str:
        entry = self.entries[tensor]
        return source_fingerprint(self._base, entry.stored.name) if not entry.private else ""

    def _position(self, segment: Segment) -> int:
        position = self.entries[segment.tensor].fused
        assert position is not None
        return position

    def _header(self, shard: int) -> tuple[bytes, dict[str, StoredTensor], int]:
        stored = [self.entries[k].stored for k in self.shards[shard]]
        contents = [(t.name, t.dtype, t.shape) for t in stored]
        return new_header(Path(self._file_names[shard]), contents, {"format": "pt"})

    def files(self, shard: int, generation: int) -> list[NewFile]:
        header, _, size = self._header(shard)
        return [NewFile(self._file_names[shard], header, size)]

    def _new_places(self, shard: int) -> dict[str, StoredTensor]:
        return self._header(shard)[1]

    @property
    def layout(self) -> str:
        """A digest of where everything goes: processes that write together must agree on it."""
        headers = (self._header(shard)[0] for shard in range(len(self.shards)))
        return xxhash.xxh3_64_hexdigest(b"".join(headers))

    def index(self) -> dict[str, Any] | None:
        """What the folder's index says; None for a single file without one."""
        if len(self.shards) == 1 and not (
            isinstance(self._base, SafetensorsSource) and self._base.index
        ):
            return None
        names = {
            self.entries[k].stored.name: file
            for file, tensors in zip(self._file_names, self.shards, strict=True)
            for k in tensors
        }
        total = sum(entry.stored.nbytes for entry in self.entries)
        return {"metadata": {"total_size": total}, "weight_map": names}


def _groups(base: Source) -> dict[str, list[Stored]]:
    """The base's tensors by the name of the file that they go to."""
    if isinstance(base, SafetensorsSource) and (base.folder or len(base.weights) > 1):
        groups: dict[str, list[Stored]] = {file.name: [] for file in base.weights}
        for tensor in base.tensors.values():
            groups[tensor.file.name].append(tensor)
        return groups
    if isinstance(base, SafetensorsSource):  # one file, whatever its name
        return {SINGLE: list(base.tensors.values())}
    parts: list[list[Stored]] = [[]]
    for stored in base.tensors.values():
        if parts[-1] and sum(t.nbytes for t in parts[-1]) + stored.nbytes > FILE_BYTES:
            parts.append([])
        parts[-1].append(stored)
    if len(parts) == 1:
        return {SINGLE: parts[0]}
    count = len(parts)
    return {f"model-{k:05}-of-{count:05}.safetensors": p for k, p in enumerate(parts, start=1)}


def _entries(
    state: StateFiles, task: int, base: Source, groups: Sequence[Sequence[Stored]]
) -> tuple[list[Entry], list[list[int]]]:
    """What to write, and which of it into each file."""
    spec = state.manifest.spec
    positions = {entry.name: k for k, entry in enumerate(spec.tensors)}
    positions |= {alias: positions[name] for alias, name in spec.aliases.items()}
    private = state.private(task)
    entries: list[Entry] = []
    shards: list[list[int]] = []
    for group in groups:
        chosen = [
            Entry(private[t.name], private=True)
            if t.name in private
            else Entry(t, fused=positions.get(t.name))
            for t in group
        ]
        shards.append(list(range(len(entries), len(entries) + len(chosen))))
        entries += chosen
    for name, tensor in private.items():
        if name not in base.tensors:  # a head that the base does not have
            shards[-1].append(len(entries))
            entries.append(Entry(tensor, private=True))
    return entries, shards


_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".h5", ".msgpack", ".onnx", ".gguf")


def others_in(folder: Path, report: Report) -> list[Path]:
    """What is in a model's folder beside the weights: configuration, tokenizer, processor; relative
    to the folder. Folders in it that hold a model or a state of their own stay where they are, and
    so does what is no file, or cannot be read; for these ``report`` gets a line.
    """
    found = []
    for path, folders, files in os.walk(folder):
        if Path(path) != folder and any(map(_is_weights, files)):
            folders.clear()
            continue
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in sorted(files):
            file = Path(path, name)
            if name.startswith(".") or _is_weights(name):
                continue
            if file.is_file() and os.access(file, os.R_OK):
                found.append(file.relative_to(folder))
            else:
                report(f"{file} is left out: it is no file that can be read")
    return found


def _is_weights(name: str) -> bool:
    return name.endswith((*_WEIGHTS, ".distcp", ".index.json"))


def write_index(index: Mapping[str, Any], file: Path) -> None:
    """Write the index of a folder's weight files."""
    file.write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
