"""Whether a unified checkpoint is whole, and over which base model: everything that is wrong with
it, not only what a reader would stumble over first."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Set
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from functools import partial
from pathlib import Path

import torch

from condu.checkpoint.fingerprints import source_fingerprint
from condu.checkpoint.sources import Source, open_source
from condu.checkpoint.state_files import described, header_of
from condu.checkpoint.tensor_files import FileReader, StoredTensor, has_nan, pieces
from condu_ext.contents import (
    TensorFiles,
    check_size,
    check_sum,
    delta_files,
    mask_files,
    private_file,
)
from condu_ext.layout import TensorSpec
from condu_ext.manifest import CONFIG, CheckpointError, Manifest, TaskEntry, read_manifest
from condu_ext.rescale import rescalers

_THREADS = min(8, os.cpu_count() or 1)
_BASE_THREADS = 2  # each holds a piece of a tensor, and they may all read from one disk

Check = Callable[[], Iterable[str]]
"""Looks at something and says what is wrong with it; what cannot be read is wrong too."""


def verify(
    path: str | os.PathLike[str],
    base: str | os.PathLike[str] | None = None,
    *,
    allow_pickle: bool = False,
) -> list[str]:
    """Everything that is wrong with a unified checkpoint, a line each; empty for a whole one.

    Looked at are: size, checksum and header of each data file; that no value of the unified delta
    is NaN or infinite, and no private one NaN; that bits past the end of a mask, and all bits where
    λ is 0, are 0; that λ follows from the sums by the rule. With ``base`` also its fingerprint,
    tensor by tensor. Files are read by ranges, in bounded memory.

    Args:
        path: the folder.
        base: the base model, as :func:`condu.checkpoint.unify` takes it.
        allow_pickle: read ``base`` even if that takes unpickling.

    Raises:
        FileNotFoundError: no checkpoint there, or no base model.
        CheckpointError: a ``config.json`` that makes no sense.
        OSError, ValueError: ``base`` cannot be read, or the state has no fingerprint to compare.
    """
    directory = Path(path)
    while True:
        manifest = read_manifest(directory)
        if base is None:
            found = _state_faults(directory, manifest)
        elif manifest.base_fingerprints:
            with closing(open_source(base, allow_pickle=allow_pickle)) as source:
                found = _state_faults(directory, manifest) + _base_faults(manifest, source)
        else:
            raise ValueError(f"{directory}: the state has no fingerprint of its base model")
        # a writer may have replaced the state while it was being read
        if not found or read_manifest(directory) == manifest:
            return found


def _state_faults(directory: Path, manifest: Manifest) -> list[str]:
    checks: list[Check] = []  # that read data, and are worth a thread
    found, intact = [], set()
    for name, listed in manifest.files.items():
        file = directory / name
        faults = _attempt(partial(_raised, check_size, file, listed))
        found += faults
        if not faults:
            intact.add(file)
            checks.append(partial(_raised, check_sum, file, listed))
    with FileReader() as reader:
        for delta in _fitting(delta_files(directory, manifest), intact, found):
            checks.append(partial(_value_faults, reader, delta))
        specs = {entry.name: (k, entry) for k, entry in enumerate(manifest.spec.tensors)}
        for task in manifest.tasks:
            for mask in _fitting(mask_files(directory, manifest, task), intact, found):
                k, entry = specs[mask.name]
                dead = task.rescaler[k] == 0
                checks.append(partial(_bit_faults, reader, task, mask, entry, dead))
            private = private_file(directory, manifest, task)
            if private in intact:
                checks.append(partial(_private_faults, reader, task, private))
        found += _all(checks, _THREADS)
    return found + list(_rescaler_faults(directory, manifest))


def _attempt(check: Check) -> list[str]:
    try:
        return list(check())
    except OSError as error:
        return [str(error)]


def _all(checks: Iterable[Check], threads: int) -> list[str]:
    with ThreadPoolExecutor(threads) as pool:
        return [fault for faults in pool.map(_attempt, checks) for fault in faults]


def _raised(check: Callable[..., object], *arguments: object) -> Iterator[str]:
    try:
        check(*arguments)
    except CheckpointError as error:
        yield str(error)


def _fitting(expected: TensorFiles, intact: Set[Path], found: list[str]) -> list[StoredTensor]:
    """The tensors of one kind that are as they should be; complaints about others into ``found``.

    Files that are not ``intact`` are passed over, for they have been complained about; what is
    missing then is unknown.
    """
    fitting: list[StoredTensor] = []
    found += (unlisted := list(expected.unlisted()))
    complete = not unlisted
    for file in expected.files:
        try:
            header = header_of(file) if file in intact else None
        except (CheckpointError, OSError) as error:
            found.append(str(error))
            header = None
        if header is None:
            complete = False
            continue
        for name, tensor in header.items():
            misfits = list(expected.misfits(file, described({name: tensor})))
            found += misfits
            if not misfits:
                fitting.append(tensor)
    if complete:
        found += expected.missing()
    return fitting


def _pieces(reader: FileReader, tensor: StoredTensor) -> Iterator[torch.Tensor]:
    return (piece for _, piece in pieces(partial(reader.read, tensor), tensor))


def _value_faults(reader: FileReader, delta: StoredTensor) -> Iterator[str]:
    bad = sum(int((~piece.isfinite()).sum()) for piece in _pieces(reader, delta))
    if bad:
        yield f"{delta.file}: tensor {delta.name!r} has {bad:,} NaN or infinite values"


def _private_faults(reader: FileReader, task: TaskEntry, file: Path) -> Iterator[str]:
    try:
        private = header_of(file)
    except CheckpointError as error:
        yield str(error)
        return
    for name, tensor in private.items():
        if any(has_nan(piece) for piece in _pieces(reader, tensor)):
            yield f"{file}: task {task.name!r}, private tensor {name!r} has NaN values"


def _bit_faults(
    reader: FileReader, task: TaskEntry, mask: StoredTensor, entry: TensorSpec, dead: bool
) -> Iterator[str]:
    where = f"{mask.file}: task {task.name!r}, tensor {mask.name!r}"
    if entry.numel % 8:
        last = torch.empty(1, dtype=torch.uint8)
        reader.read(mask, mask.numel - 1, mask.numel, last)
        if int(last) >> entry.numel % 8:
            yield f"{where}: bits past the end of the mask are set"
    if dead and any(bool(piece.any()) for piece in _pieces(reader, mask)):
        yield f"{where}: bits of the mask are set, but λ is 0"


def _rescaler_faults(directory: Path, manifest: Manifest) -> Iterator[str]:
    """Rescalers that do not follow from the sums, the first of each task."""
    tensors = manifest.spec.tensors
    shape = len(manifest.tasks), len(tensors)
    num, den, stored = (
        torch.tensor([getattr(task, field) for task in manifest.tasks], dtype=dtype).view(shape)
        for field, dtype in (
            ("num", torch.float64),
            ("den", torch.float64),
            ("rescaler", torch.float32),
        )
    )
    expected = rescalers(manifest.rule, num, den, [entry.numel for entry in tensors])
    for task, ours, theirs in zip(manifest.tasks, expected, stored, strict=True):
        for k in torch.nonzero(ours != theirs).flatten().tolist()[:1]:
            yield (
                f"{directory / CONFIG}: task {task.name!r}, tensor {tensors[k].name!r}: λ is "
                f"{float(theirs[k])!r}, by the sums it is {float(ours[k])!r}"
            )


def _base_faults(manifest: Manifest, source: Source) -> list[str]:
    if source.is_delta:
        raise ValueError(f"{source.where} is an adapter: the base is the model that it adapts")
    checks = [partial(_base_fault, manifest, source, entry) for entry in manifest.spec.tensors]
    return _all(checks, _BASE_THREADS)


def _base_fault(manifest: Manifest, source: Source, entry: TensorSpec) -> Iterator[str]:
    names = [name for name in manifest.spec.names_of(entry.name) if name in source.tensors]
    where = f"{source.where}, tensor {[*names, entry.name][0]!r}"
    recorded = manifest.base_fingerprints.get(entry.name)
    if not names:
        yield f"{where}: is missing"
    elif (shape := source.tensors[names[0]].shape) != entry.shape:
        yield f"{where}: shape {list(shape)}, the state's is {list(entry.shape)}"
    elif recorded is None:
        yield f"{where}: the state has no fingerprint of it"
    elif source_fingerprint(source, names[0]) != recorded:
        named = f" ({manifest.base_name})" if manifest.base_name else ""
        yield f"{where}: differs from the base model{named} that the state was made over"
