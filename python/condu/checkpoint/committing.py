"""The commit of a streamed state: from the records of all shards to its ``config.json``."""

from __future__ import annotations

import os
from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import torch
import xxhash
from torch import Tensor

from condu.checkpoint.matching import Matched
from condu.checkpoint.prepared import Records
from condu.checkpoint.sources import Source, Stored
from condu.checkpoint.state_files import StateFiles
from condu.checkpoint.state_job import StateJob
from condu.checkpoint.target import Target
from condu.checkpoint.tensor_files import (
    PIECE,
    FileReader,
    StoredTensor,
    as_bytes,
    has_nan,
    new_header,
    pieces,
)
from condu_ext import _C
from condu_ext.files import replace
from condu_ext.manifest import CONFIG, Manifest, TaskEntry, generation_of, read_manifest
from condu_ext.rescale import rescalers, warn_of


def left_over(target: Target) -> list[str]:
    """The files that interrupted runs of other commands left in a folder without a state.

    Raises:
        ValueError: another process made a state there meanwhile.
    """
    if (target.folder / CONFIG).exists():
        raise ValueError(f"{target.folder}: another process made a state there meanwhile")
    return _others(target, ())


class Unchanged:
    """:func:`left_over` of a folder with a state, which must still be the one that was checked."""

    def __init__(self, old: StateFiles) -> None:
        self._old = old

    def __call__(self, target: Target) -> list[str]:
        if read_manifest(target.folder) != self._old.manifest:
            raise RuntimeError(f"{target.folder}: another process changed the state meanwhile")
        return _others(target, self._old.manifest.files)


def _others(target: Target, kept: Container[str]) -> list[str]:
    """Names of the data files in a folder that belong to no state."""
    return [n for n in os.listdir(target.folder) if generation_of(n) and n not in kept]


class Commit:
    """From the records of all shards to a state's ``config.json``."""

    def __init__(
        self,
        job: StateJob,
        fingerprints: Mapping[str, str],
        base_name: str | None,
        newcomers: Mapping[str, Matched],
        states: Sequence[StateFiles] = (),
    ) -> None:
        self._job, self._fingerprints, self._base_name = job, fingerprints, base_name
        self._newcomers, self._states = newcomers, states

    def __call__(self, target: Target, records: Records) -> None:
        job, fusion = self._job, self._job.fusion
        files = {name: entry for k in sorted(records) for name, entry in records[k].files.items()}
        num, den = fusion.tables(self._sums(records))
        table = rescalers(job.rule, num, den, job.numels)
        died = self._clear_dead(target, files, num, table)
        files |= self._copy_private(target)
        tasks = [
            TaskEntry(task, number, *(t[number].tolist() for t in (num, den, table)))
            for number, task in enumerate(fusion.tasks)
        ]
        manifest = Manifest(
            generation=target.generation,
            shards=len(job.shards),
            spec=job.spec,
            dtype=job.dtype,
            rule=job.rule,
            tasks=tasks,
            base_name=self._base_name,
            base_fingerprints=self._prints(records),
            files=files,
            library_version=_C.version,
            zero_sums=self._by_tensor(records, "zero_sums"),
        )
        text = manifest.to_json()
        replace(target.folder / CONFIG, lambda file: file.write_text(text, "utf-8"))
        target.commit_state(_others(target, files))
        warn_of(died)

    def others(self, generation: int) -> dict[str, int]:
        """The files of private tensors."""
        return {
            _private_file(generation, number): _header(source)[2]
            for number, source in enumerate(self._private())
            if source.tensors
        }

    def _private(self) -> list[_Tensors]:
        """The private tensors of all tasks, those of old ones from their states."""
        sources: list[_Tensors] = [
            _PrivateOf(state, number)
            for state in self._states
            for number in range(len(state.manifest.tasks))
        ]
        return sources + [_Picked(m.source, m.private) for m in self._newcomers.values()]

    def _by_tensor(self, records: Records, what: str) -> list[Any]:
        found: dict[int, Any] = {}
        for k, record in records.items():
            found |= zip(self._job.shards[k], getattr(record, what), strict=True)
        return [found[tensor] for tensor in range(len(self._job.numels))]

    def _sums(self, records: Records) -> Tensor:
        sums = torch.zeros(self._job.chunk_rows, len(self._job.numels), dtype=torch.float64)
        for k, record in records.items():
            shape = self._job.chunk_rows, len(self._job.shards[k])
            sums[:, list(self._job.shards[k])] = torch.tensor(
                record.sums, dtype=torch.float64
            ).view(shape)
        return sums

    def _prints(self, records: Records) -> dict[str, str]:
        if not self._job.has_base:
            return dict(self._fingerprints)
        empty = xxhash.xxh3_64_hexdigest(b"")
        digits = self._by_tensor(records, "base")
        names = [entry.name for entry in self._job.spec.tensors]
        return {name: found or empty for name, found in zip(names, digits, strict=True)}

    def _clear_dead(
        self, target: Target, files: dict[str, dict[str, Any]], num: Tensor, table: Tensor
    ) -> list[str]:
        """Clear the masks of tasks, or of their tensors, that were outvoted everywhere; names of
        the tasks that died just now (as :func:`condu_ext.rescale.apply_rescalers`)."""
        job, died = self._job, []
        before = [bool((row > 0).any()) for state in self._states for row in state.rescaler]
        before += [True] * (len(job.fusion.tasks) - len(before))
        for number, task in enumerate(job.fusion.tasks):
            if not ((table[number] == 0) & (num[number] > 0)).any():
                continue
            for k, tensors in enumerate(job.shards):
                dead = [t for t in tensors if table[number, t] == 0]
                if name := self._clear_bits(target, k, number, dead):
                    files[name] = files[name] | {"xxh3": target.fingerprint(name)}
            if before[number] and bool((table[number] == 0).all()):
                died.append(task)
        return died

    def _clear_bits(
        self, target: Target, shard: int, task: int, tensors: Sequence[int]
    ) -> str | None:
        """Clear a task's masks of some tensors; the name of the file if any bit was set."""
        file = target.folder / self._job.trigger_files(shard, target.generation)[task]
        places = self._job.layout(shard).triggers.places
        changed = None
        with FileReader() as reader:
            for tensor in tensors:
                size = (self._job.numels[tensor] + 7) // 8
                for start in range(0, size, PIECE):
                    bits = torch.empty(min(PIECE, size - start), dtype=torch.uint8)
                    reader.read_bytes(file, places[tensor] + start, as_bytes(bits))
                    if bits.any():
                        target.write(file.name, places[tensor] + start, as_bytes(bits.zero_()))
                        changed = file.name
        if changed:
            target.settle([changed])
        return changed

    def _copy_private(self, target: Target) -> dict[str, dict[str, Any]]:
        """Write the private tensors of all tasks.

        Raises:
            ValueError: NaN in one, naming task and tensor.
        """
        files = {}
        tasks = self._job.fusion.tasks
        for number, (task, source) in enumerate(zip(tasks, self._private(), strict=True)):
            if source.tensors:
                name = _private_file(target.generation, number)
                files[name] = _copied(target, name, task, source)
        return files


def _private_file(generation: int, number: int) -> str:
    return f"private-{generation}-{number}-00001-of-00001.safetensors"


class _Tensors(Protocol):
    """Tensors to copy."""

    @property
    def tensors(self) -> Mapping[str, Stored]: ...

    def read(self, name: str, start: int, stop: int, out: Tensor) -> None: ...


@dataclass(frozen=True)
class _Picked:
    """Some of a model's tensors."""

    source: Source
    tensors: Mapping[str, Stored]

    def read(self, name: str, start: int, stop: int, out: Tensor) -> None:
        self.source.read(name, start, stop, out)


class _PrivateOf:
    """The private tensors of a task of a state."""

    def __init__(self, state: StateFiles, task: int) -> None:
        self._state, self._task = state, task
        self.tensors: Mapping[str, Stored] = state.private(task)

    def read(self, name: str, start: int, stop: int, out: Tensor) -> None:
        self._state.read_private(self._task, name, start, stop, out)


def _header(source: _Tensors) -> tuple[bytes, dict[str, StoredTensor], int]:
    return new_header(Path(), [(t.name, t.dtype, t.shape) for t in source.tensors.values()])


def _copied(target: Target, file: str, task: str, source: _Tensors) -> dict[str, Any]:
    """Write a task's tensors into a file of their own, piece by piece; its size and checksum."""
    header, places, size = _header(source)
    digest = xxhash.xxh3_64(header)
    target.write(file, 0, header)
    for name, tensor in source.tensors.items():
        for start, piece in pieces(partial(source.read, name), tensor):
            if has_nan(piece):  # infinity may be meant: masks of attention have it
                raise ValueError(f"task {task!r}, private tensor {name!r}: has NaN values")
            target.write(file, places[name].offset + start * tensor.dtype.itemsize, as_bytes(piece))
            digest.update(as_bytes(piece))
    target.settle([file])
    return {"size": size, "xxh3": digest.hexdigest()}
