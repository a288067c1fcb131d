"""What the data files of a unified checkpoint are and must hold, by its ``config.json``."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch

from condu_ext.fingerprint import file_fingerprint
from condu_ext.manifest import CONFIG, CheckpointError, Manifest, TaskEntry

Found = TypeVar("Found")


def until_settled(
    read_manifest: Callable[[], Manifest], read: Callable[[Manifest], Found]
) -> Found:
    """What ``read`` makes of a state that a writer may replace, or drop a task of, meanwhile.

    Raises:
        FileNotFoundError: a file is missing of a state that still is the folder's.
    """
    while True:
        manifest = read_manifest()
        try:
            return read(manifest)
        except FileNotFoundError:
            if read_manifest() == manifest:
                raise


class TensorFiles:
    """The files that hold one kind of tensor, one for each of the fused ones: the unified delta or
    a task's masks.

    Attributes:
        files: one for each shard.
        shapes: of the tensors by name.
        dtype: of all of them.
    """

    def __init__(
        self,
        directory: Path,
        manifest: Manifest,
        prefix: str,
        shapes: Mapping[str, tuple[int, ...]],
        dtype: torch.dtype,
    ) -> None:
        shards = range(1, manifest.shards + 1)
        self.files = [
            directory / f"{prefix}-{k:05}-of-{manifest.shards:05}.safetensors" for k in shards
        ]
        self.shapes, self.dtype = shapes, dtype
        self._listed = manifest.files
        self._homes: dict[str, Path] = {}

    def unlisted(self) -> Iterator[str]:
        """Complaints about files that ``config.json`` does not list."""
        for file in self.files:
            if file.name not in self._listed:
                yield f"{file.parent / CONFIG}: does not list {file.name}"

    def misfits(
        self, file: Path, tensors: Iterable[tuple[str, torch.dtype | str, tuple[int, ...]]]
    ) -> Iterator[str]:
        """Complaints about the names, dtypes and shapes that one of the files has."""
        for name, dtype, shape in tensors:
            if name not in self.shapes:
                yield f"{file}: tensor {name!r} is not one of the state's"
            elif (dtype, shape) != (self.dtype, self.shapes[name]):
                yield (
                    f"{file}: tensor {name!r} is {dtype} {list(shape)}, "
                    f"expected {self.dtype} {list(self.shapes[name])}"
                )
            elif (home := self._homes.setdefault(name, file)) != file:
                yield f"{file}: tensor {name!r} is in {home.name} too"

    def missing(self) -> Iterator[str]:
        """Complaints about tensors that none of the files had."""
        for name in self.shapes:
            if name not in self._homes:
                yield f"{self.files[0]}: tensor {name!r} is missing"


def delta_files(directory: Path, manifest: Manifest) -> TensorFiles:
    """The files of the unified delta."""
    shapes = {entry.name: entry.shape for entry in manifest.spec.tensors}
    prefix = f"unified-{manifest.generation}"
    return TensorFiles(directory, manifest, prefix, shapes, manifest.dtype)


def mask_files(directory: Path, manifest: Manifest, task: TaskEntry) -> TensorFiles:
    """The files of a task's packed masks."""
    shapes = {entry.name: ((entry.numel + 7) // 8,) for entry in manifest.spec.tensors}
    prefix = f"triggers-{manifest.generation}-{task.number}"
    return TensorFiles(directory, manifest, prefix, shapes, torch.uint8)


def private_file(directory: Path, manifest: Manifest, task: TaskEntry) -> Path | None:
    """The file of a task's private tensors, if it has any."""
    name = f"private-{manifest.generation}-{task.number}-00001-of-00001.safetensors"
    return directory / name if name in manifest.files else None


def refuse(complaints: Iterable[str]) -> None:
    """Raise the first complaint, if there is one, as a CheckpointError."""
    for complaint in complaints:
        raise CheckpointError(complaint)


def check_size(file: Path, listed: Mapping[str, Any]) -> None:
    """Measure a file against its entry in ``config.json``; raises a CheckpointError."""
    if (size := file.stat().st_size) != listed["size"]:
        raise CheckpointError(f"{file}: {size} bytes, expected {listed['size']}")


def check_sum(file: Path, listed: Mapping[str, Any]) -> None:
    """Read a file for its checksum; raises a CheckpointError if it is not the listed one."""
    if (digest := file_fingerprint(file)) != listed["xxh3"]:
        raise CheckpointError(f"{file}: checksum {digest}, expected {listed['xxh3']}")
