"""The unified checkpoint on disk: a folder of safetensors files and one ``config.json``.

    config.json                                             the commit point (condu_ext.manifest)
    unified-<gen>-00001-of-0000N.safetensors                unified delta by tensor name
    triggers-<gen>-<task number>-00001-of-0000N.safetensors packed mask of each tensor, uint8
    private-<gen>-<task number>-00001-of-00001.safetensors  whole tensors of a task, if it has any

A save writes files of a new generation, syncs them, replaces ``config.json``, syncs the folder, and
only then removes what the new config does not list. Killed at any point, or with the disk full, it
leaves the old state or the new one. Tensors are stored in logical (row-major) order; masks as
``numpy.packbits(bitorder="little")`` of the flattened mask. The config keeps each tensor's memory
order, so that a sequence goes on from disk exactly as it would in memory. Nothing is ever pickled.
A lock file keeps out a second writer; readers need none.
"""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from condu_ext import _C
from condu_ext._modes import without_autograd
from condu_ext.files import replace, sync
from condu_ext.fingerprint import file_fingerprint
from condu_ext.layout import TensorSpec, empty_arena
from condu_ext.manifest import (
    CONFIG,
    CheckpointError,
    Manifest,
    TaskEntry,
    generation_of,
    read_manifest,
)
from condu_ext.reference import pack_bits, unpack_bits
from condu_ext.unified import UnifiedDelta

SHARD_BYTES = 1 << 30
_LOCK = ".lock"
_SAFETENSORS_NAMES = {"F32": torch.float32, "BF16": torch.bfloat16, "U8": torch.uint8}


# ---- writing -----------------------------------------------------------------------------------


def save(state: UnifiedDelta, path: str | os.PathLike[str]) -> None:
    """Write a state to a folder, replacing the state that is there.

    Raises:
        OSError: the folder cannot be written or the disk is full; what was there stays valid.
        CheckpointError: the folder holds a ``config.json`` that is not a unified checkpoint's.
        RuntimeError: another process is writing there.
    """
    directory = Path(path)
    directory.mkdir(parents=True, exist_ok=True)
    with state.lock, _writer_lock(directory):
        state.check_whole()
        if (directory / CONFIG).exists():
            read_manifest(directory)  # refuses to replace somebody else's config.json
        generation = 1 + max((generation_of(f) or 0 for f in os.listdir(directory)), default=0)
        written: list[Path] = []
        try:
            manifest = _write_data(state, directory, generation, written)
            text = manifest.to_json()
            replace(directory / CONFIG, lambda file: file.write_text(text, encoding="utf-8"))
        except BaseException:
            # An interruption may come after the commit: then these files are the state.
            if _generation(directory) != generation:
                for file in written:
                    file.unlink(missing_ok=True)
            raise
        for name in os.listdir(directory):
            if generation_of(name) is not None and name not in manifest.files:
                (directory / name).unlink(missing_ok=True)


def _generation(directory: Path) -> int | None:
    """Generation of the state in a folder, None if there is none."""
    try:
        return read_manifest(directory).generation
    except (FileNotFoundError, CheckpointError):
        return None


def _write_data(
    state: UnifiedDelta, directory: Path, generation: int, written: list[Path]
) -> Manifest:
    files: dict[str, dict[str, Any]] = {}

    def write(name: str, tensors: Mapping[str, Tensor]) -> None:
        file = directory / name
        written.append(file)
        contents = {key: tensor.detach().contiguous().cpu() for key, tensor in tensors.items()}
        try:
            save_file(contents, file)
            sync(file)
        except SafetensorError as error:
            raise OSError(f"{file}: {error}") from None
        files[name] = {"size": file.stat().st_size, "xxh3": file_fingerprint(file)}

    shards = _shards(state)
    numbering = [f"{k:05}-of-{len(shards):05}" for k in range(1, len(shards) + 1)]
    delta = state.delta
    for names, label in zip(shards, numbering, strict=True):
        write(f"unified-{generation}-{label}.safetensors", {n: delta[n] for n in names})
    tasks = []
    for number, task in enumerate(state.tasks):
        masks = state.packed_mask(task)
        for names, label in zip(shards, numbering, strict=True):
            write(
                f"triggers-{generation}-{number}-{label}.safetensors",
                {n: masks[n] for n in names},
            )
        if private := state.private_of(task):
            write(f"private-{generation}-{number}-00001-of-00001.safetensors", private)
        tasks.append(TaskEntry(task, number, *_sums(state, number)))
    return Manifest(
        generation=generation,
        shards=len(shards),
        spec=state.spec,
        dtype=state.dtype,
        rule=state.rule,
        tasks=tasks,
        base_name=state.base_name,
        base_fingerprints=state.base_fingerprints,
        files=files,
        library_version=_C.version,
    )


def _shards(state: UnifiedDelta) -> list[list[str]]:
    """Names of the fused tensors, cut into files of about SHARD_BYTES of unified delta."""
    shards: list[list[str]] = [[]]
    filled = 0
    for entry in state.spec.tensors:
        size = entry.numel * state.dtype.itemsize
        if shards[-1] and filled + size > SHARD_BYTES:
            shards.append([])
            filled = 0
        shards[-1].append(entry.name)
        filled += size
    return shards


def _sums(state: UnifiedDelta, position: int) -> tuple[list[float], list[float], list[float]]:
    """num, den and λ of a task by tensor, in the order of the spec."""
    columns: tuple[dict[int, float], ...] = ({}, {}, {})
    for arena in state.arenas:
        for column, table in zip(columns, (arena.num, arena.den, arena.rescaler), strict=True):
            column.update(zip(arena.index, table[position].tolist(), strict=True))
    num, den, rescaler = ([c[k] for k in range(len(state.spec.tensors))] for c in columns)
    return num, den, rescaler


@contextmanager
def _writer_lock(directory: Path) -> Iterator[None]:
    with open(directory / _LOCK, "w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise RuntimeError(f"{directory}: another process is writing this state") from None
        yield


# ---- reading -----------------------------------------------------------------------------------


@without_autograd
def load(path: str | os.PathLike[str]) -> UnifiedDelta:
    """Read a state onto the CPU, checking sizes and checksums of all its files.

    Raises:
        FileNotFoundError: no checkpoint there, or one of its files is missing.
        CheckpointError: an unknown format version, a wrong size or checksum, names, shapes or
            dtypes that do not fit; the message names the file.
    """
    directory = Path(path)
    while True:
        manifest = read_manifest(directory)
        try:
            return _read_state(directory, manifest)
        except FileNotFoundError:
            # A writer may have replaced the state while it was being read: then there is a new one.
            if read_manifest(directory).generation == manifest.generation:
                raise


def _read_state(directory: Path, manifest: Manifest) -> UnifiedDelta:
    for name, expected in manifest.files.items():
        file = directory / name
        size = file.stat().st_size
        if size != expected["size"]:
            raise CheckpointError(f"{file}: {size} bytes, expected {expected['size']}")
        if (digest := file_fingerprint(file)) != expected["xxh3"]:
            raise CheckpointError(f"{file}: checksum {digest}, expected {expected['xxh3']}")

    spec, tasks = manifest.spec, manifest.tasks
    generation, numels = manifest.generation, [t.numel for t in spec.tensors]
    shapes = {t.name: list(t.shape) for t in spec.tensors}
    packed = {t.name: [(t.numel + 7) // 8] for t in spec.tensors}
    with _Tensors(directory, manifest, f"unified-{generation}", shapes, manifest.dtype) as unified:
        arena = empty_arena(range(len(numels)), numels, manifest.dtype, torch.device("cpu"))
        starts = dict(zip(shapes, arena.starts, strict=True))
        entries = {entry.name: entry for entry in spec.tensors}
        for name, tensor in unified:
            part = slice(starts[name], starts[name] + tensor.numel())
            arena.u[part] = entries[name].flatten(tensor)
    for task in tasks:
        plane = torch.zeros(arena.u.numel() // 8, dtype=torch.uint8, device="cpu")
        prefix = f"triggers-{generation}-{task.number}"
        with _Tensors(directory, manifest, prefix, packed, torch.uint8) as masks:
            for name, tensor in masks:
                packed_part = slice(starts[name] // 8, starts[name] // 8 + tensor.numel())
                plane[packed_part] = _in_memory_order(entries[name], tensor)
        arena.planes.append(plane)
    shape = (len(tasks), len(numels))
    arena.num = _table([t.num for t in tasks], torch.float64, shape)
    arena.den = _table([t.den for t in tasks], torch.float64, shape)
    arena.rescaler = _table([t.rescaler for t in tasks], torch.float32, shape)
    state = UnifiedDelta(
        spec,
        [arena],
        tasks=[task.name for task in tasks],
        rule=manifest.rule,
        dtype=manifest.dtype,
        private={task.name: _read_private(directory, manifest, task.number) for task in tasks},
    )
    state.base_name = manifest.base_name
    state.base_fingerprints = manifest.base_fingerprints
    return state


def _in_memory_order(entry: TensorSpec, packed_mask: Tensor) -> Tensor:
    """A mask's bits in the order of the arena, from those in logical order."""
    if entry.order == tuple(range(len(entry.order))):
        return packed_mask
    mask = unpack_bits(packed_mask, entry.numel).view(entry.shape)
    return pack_bits(entry.flatten(mask))


def _table(rows: list[list[float]], dtype: torch.dtype, shape: tuple[int, int]) -> Tensor:
    return torch.tensor(rows, dtype=dtype, device="cpu").view(shape)


class _Tensors:
    """The tensors of one kind over all shards; names, shapes and dtypes are checked on entry,
    before anything of their size is allocated."""

    def __init__(
        self,
        directory: Path,
        manifest: Manifest,
        prefix: str,
        shapes: Mapping[str, Sequence[int]],
        dtype: torch.dtype,
    ) -> None:
        total = manifest.shards
        self.files = [
            directory / f"{prefix}-{k:05}-of-{total:05}.safetensors" for k in range(1, total + 1)
        ]
        for file in self.files:
            if file.name not in manifest.files:
                raise CheckpointError(f"{directory / CONFIG}: does not list {file.name}")
        self.shapes, self.dtype = shapes, dtype

    def __enter__(self) -> _Tensors:
        self.handles = [_open(file) for file in self.files]
        seen: set[str] = set()
        for file, handle in zip(self.files, self.handles, strict=True):
            for name in handle.keys():  # noqa: SIM118 (a safetensors handle is no mapping)
                part = handle.get_slice(name)
                found = (part.get_shape(), _SAFETENSORS_NAMES.get(part.get_dtype()))
                if name not in self.shapes or found != (list(self.shapes[name]), self.dtype):
                    expected = self.shapes.get(name, "no such tensor")
                    raise CheckpointError(
                        f"{file}: tensor {name!r} is {part.get_dtype()} {found[0]}, "
                        f"expected {self.dtype} {expected}"
                    )
                seen.add(name)
        if missing := [name for name in self.shapes if name not in seen]:
            raise CheckpointError(f"{self.files[0]}: tensor {missing[0]!r} is missing")
        return self

    def __exit__(self, *_: object) -> None:
        self.handles.clear()

    def __iter__(self) -> Iterator[tuple[str, Tensor]]:
        for handle in self.handles:
            for name in handle.keys():  # noqa: SIM118
                yield name, handle.get_tensor(name)


def _open(file: Path) -> Any:
    try:
        return safe_open(file, framework="pt")
    except SafetensorError as error:
        raise CheckpointError(f"{file}: not a valid safetensors file ({error})") from None


def _read_private(directory: Path, manifest: Manifest, number: int) -> dict[str, Tensor]:
    name = f"private-{manifest.generation}-{number}-00001-of-00001.safetensors"
    if name not in manifest.files:
        return {}
    handle = _open(directory / name)
    return {key: handle.get_tensor(key).clone() for key in handle.keys()}  # noqa: SIM118
