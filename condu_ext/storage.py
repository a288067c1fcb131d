"""Writing the unified checkpoint: a folder of safetensors files and one ``config.json``.

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
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from condu_ext import _C
from condu_ext.collective import Step
from condu_ext.files import replace, sync
from condu_ext.fingerprint import file_fingerprint
from condu_ext.gathering import visit_whole
from condu_ext.layout import TensorSpec
from condu_ext.manifest import (
    CONFIG,
    CheckpointError,
    Manifest,
    TaskEntry,
    generation_of,
    read_manifest,
)
from condu_ext.reference import pack_bits
from condu_ext.sharding import leads
from condu_ext.unified import UnifiedDelta
from condu_ext.views import logical_bits, mask_bits, shaped_mask

SHARD_BYTES = 1 << 30
LOCK = ".lock"


def save(state: UnifiedDelta, path: str | os.PathLike[str]) -> None:
    """Write a state to a folder, replacing the state that is there.

    Collective for a sharded state, on a folder that all processes see: the first process of the
    mesh writes, and holds the whole tensors of one file (about 1 GiB, or one larger tensor) in host
    memory while it does; the others hold one whole tensor at a time. All return after the commit.
    Of replicas that each have a mesh of their own, only one may save to a folder.

    Raises:
        OSError: the folder cannot be written or the disk is full; what was there stays valid.
        CheckpointError: the folder holds a ``config.json`` that is not a unified checkpoint's.
        RuntimeError: another process is writing there.
    """
    directory, mesh = Path(path), state.spec.mesh
    writes = leads(mesh)
    generation = 0
    with state.lock, ExitStack() as held:
        with Step(mesh) as step:
            state.check_whole()
            step.claims["the tasks"] = state.tasks
            if writes:
                directory.mkdir(parents=True, exist_ok=True)
                held.enter_context(writer_lock(directory))
                if (directory / CONFIG).exists():
                    read_manifest(directory)  # refuses to replace somebody else's config.json
                numbers = (generation_of(file) or 0 for file in os.listdir(directory))
                generation = 1 + max(numbers, default=0)
        written: list[Path] = []
        try:
            manifest = _write_data(state, directory, generation, written)
            with Step(mesh):
                if writes:
                    text = manifest.to_json()
                    replace(directory / CONFIG, lambda file: file.write_text(text, "utf-8"))
        except BaseException:
            # An interruption may come after the commit: then these files are the state.
            if writes and _generation(directory) != generation:
                for file in written:
                    file.unlink(missing_ok=True)
            raise
        if writes:
            with suppress(OSError):  # the new state is in force; the next save cleans up again
                _remove_others(directory, manifest)


def _remove_others(directory: Path, manifest: Manifest) -> None:
    """Remove the data files that the folder's state does not list."""
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
    """Writes all data files; ``written`` and the manifest's files are filled where they are
    written."""
    files: dict[str, dict[str, Any]] = {}
    mesh = state.spec.mesh
    writes = leads(mesh)

    def write(
        name: str,
        tensors: Iterable[tuple[str, Tensor]],
        form: Callable[[str, Tensor], Tensor] = lambda _, tensor: tensor,
    ) -> None:
        contents: dict[str, Tensor] = {}

        def keep(key: str, tensor: Tensor) -> None:
            if writes:
                contents[key] = form(key, tensor).detach().contiguous().cpu()

        visit_whole(mesh, tensors, keep)
        with Step(mesh):
            if not writes:
                return
            file = directory / name
            written.append(file)
            try:
                save_file(contents, file)
                sync(file)
            except SafetensorError as error:
                raise OSError(f"{file}: {error}") from None
            files[name] = {"size": file.stat().st_size, "xxh3": file_fingerprint(file)}

    tensors = state.spec.tensors
    groups = shards_of([entry.numel for entry in tensors], state.dtype)
    shards = [[tensors[k] for k in group] for group in groups]
    numbering = [f"{k:05}-of-{len(shards):05}" for k in range(1, len(shards) + 1)]
    delta = state.delta
    for entries, label in zip(shards, numbering, strict=True):
        write(
            f"unified-{generation}-{label}.safetensors", ((e.name, delta[e.name]) for e in entries)
        )
    specs = {entry.name: entry for entry in state.spec.tensors}
    tasks = []
    for number, task in enumerate(state.tasks):
        bits = mask_bits(state.spec, state.arenas, number)
        for entries, label in zip(shards, numbering, strict=True):
            write(
                f"triggers-{generation}-{number}-{label}.safetensors",
                ((e.name, _mask(e, bits[e.name])) for e in entries),
                lambda name, mask: _packed(specs[name], mask),
            )
        if private := state.private_of(task):
            write(f"private-{generation}-{number}-00001-of-00001.safetensors", private.items())
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


def _mask(entry: TensorSpec, bits: Tensor) -> Tensor:
    """What there is to gather of a mask: elements of a sharded tensor's, a plain one's bits."""
    return bits if entry.shard is None else shaped_mask(entry, bits)


def _packed(entry: TensorSpec, mask: Tensor) -> Tensor:
    """The packed mask of a whole tensor in logical order, from all that :func:`_mask` gave."""
    return logical_bits(entry, mask) if entry.shard is None else pack_bits(mask.reshape(-1))


def shards_of(numels: Sequence[int], dtype: torch.dtype) -> list[list[int]]:
    """Positions of tensors of these sizes in each file of about SHARD_BYTES of unified delta."""
    shards: list[list[int]] = [[]]
    filled = 0
    for position, numel in enumerate(numels):
        size = numel * dtype.itemsize
        if shards[-1] and filled + size > SHARD_BYTES:
            shards.append([])
            filled = 0
        shards[-1].append(position)
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
def writer_lock(directory: Path) -> Iterator[None]:
    """Held by whoever changes the state in a folder.

    Raises:
        RuntimeError: another process holds it. OSError: the folder cannot be written.
    """
    file, held = directory / LOCK, False
    while not held:
        with open(file, "a") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise RuntimeError(f"{directory}: another process is writing this state") from None
            # whoever held it may have removed it since it was opened: then it keeps nobody out
            held = file.exists() and os.path.samestat(os.fstat(lock.fileno()), file.stat())
            if held:
                yield
