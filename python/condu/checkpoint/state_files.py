"""A unified checkpoint on disk, read by ranges of elements."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from torch import Tensor

from condu.checkpoint.tensor_files import FileReader, StoredTensor, read_header
from condu_ext.contents import (
    TensorFiles,
    check_size,
    check_sum,
    delta_files,
    mask_files,
    private_file,
    refuse,
    until_settled,
)
from condu_ext.manifest import CheckpointError, Manifest, read_manifest

_HASHING_THREADS = 8  # more do not make a disk faster


class StateFiles:
    """A unified checkpoint, opened: ``config.json``, sizes, and the names, shapes and dtypes in all
    headers are checked, no data is read yet.

    Tensors are numbered by position in ``manifest.spec.tensors``, tasks by position in
    ``manifest.tasks``. Elements are in logical (row-major) order, whatever memory order the
    manifest notes of a tensor. Reading works in any number of threads.

    Args:
        path: the folder.

    Attributes:
        directory: the folder.
        manifest: what its ``config.json`` says.
        shards: for each file of the unified delta the tensors in it, in the order of their places.
        rescaler: λ, float32 [tasks, tensors].
        files: all data files, in the manifest's order.

    Raises:
        FileNotFoundError: no checkpoint there, or one of its files is missing.
        OSError: a file cannot be read.
        CheckpointError: an unknown format version, a wrong size, names, shapes or dtypes that do
            not fit; the message names the file.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.directory = Path(path)
        self._reader = FileReader()
        until_settled(lambda: read_manifest(self.directory), self._open)

    def _open(self, manifest: Manifest) -> None:
        self.manifest = manifest
        self.files: Sequence[Path] = [self.directory / name for name in manifest.files]
        for file in self.files:
            check_size(file, manifest.files[file.name])
        numbers = {entry.name: k for k, entry in enumerate(manifest.spec.tensors)}
        headers = read_checked(delta_files(self.directory, manifest))
        self.shards = [[numbers[name] for name in header] for header in headers]
        self._delta = _by_number(numbers, headers)
        self._masks = [
            _by_number(numbers, read_checked(mask_files(self.directory, manifest, task)))
            for task in manifest.tasks
        ]
        self._private: list[Mapping[str, StoredTensor]] = []
        for task in manifest.tasks:
            private = private_file(self.directory, manifest, task)
            self._private.append({} if private is None else header_of(private))
        table = [task.rescaler for task in manifest.tasks]
        shape = (len(manifest.tasks), len(manifest.spec.tensors))
        self.rescaler = torch.tensor(table, dtype=torch.float32, device="cpu").view(shape)

    @property
    def data_bytes(self) -> int:
        """Bytes of the unified delta and all masks."""
        tensors = [*self._delta.values(), *(t for masks in self._masks for t in masks.values())]
        return sum(tensor.nbytes for tensor in tensors)

    def read_delta(self, tensor: int, start: int, stop: int, out: Tensor) -> None:
        """Elements [start, stop) of a tensor's unified delta into ``out``, flat and of the state's
        dtype.

        Raises:
            OSError: the file cannot be read, or became shorter.
        """
        self._reader.read(self._delta[tensor], start, stop, out)

    def read_bits(self, task: int, tensor: int, start: int, stop: int, out: Tensor) -> None:
        """A task's mask at the elements [start, stop) of a tensor into ``out``, uint8
        [ceil((stop - start) / 8)]; ``start`` is a multiple of 8, and ``stop`` is one or the end.

        Raises:
            OSError: the file cannot be read, or became shorter.
        """
        self._reader.read(self._masks[task][tensor], start // 8, (stop + 7) // 8, out)

    def private(self, task: int) -> Mapping[str, StoredTensor]:
        """A task's private tensors by name."""
        return self._private[task]

    def read_private(self, task: int, name: str, start: int, stop: int, out: Tensor) -> None:
        """Elements [start, stop) of a private tensor into ``out``, flat and of its dtype.

        Raises:
            OSError: the file cannot be read, or became shorter.
        """
        self._reader.read(self._private[task][name], start, stop, out)

    def check_sums(self, only: Callable[[int], bool] = lambda number: True) -> None:
        """Read the files whose number in :attr:`files` is asked for, and compare checksums.

        Raises:
            OSError: a file cannot be read.
            CheckpointError: naming the first file whose bytes are not those that were saved.
        """
        chosen = [file for number, file in enumerate(self.files) if only(number)]
        with ThreadPoolExecutor(min(_HASHING_THREADS, os.cpu_count() or 1)) as pool:
            list(pool.map(lambda file: check_sum(file, self.manifest.files[file.name]), chosen))

    def close(self) -> None:
        self._reader.close()

    def __enter__(self) -> StateFiles:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def header_of(file: Path) -> dict[str, StoredTensor]:
    """The tensors of a checkpoint's data file.

    Raises:
        OSError: the file cannot be read.
        CheckpointError: it is not a valid safetensors file.
    """
    try:
        return read_header(file)
    except ValueError as error:
        raise CheckpointError(str(error)) from None


def described(
    header: Mapping[str, StoredTensor],
) -> Iterable[tuple[str, torch.dtype, tuple[int, ...]]]:
    """Names, dtypes and shapes as :meth:`condu_ext.contents.TensorFiles.misfits` compares them."""
    return ((tensor.name, tensor.dtype, tensor.shape) for tensor in header.values())


def read_checked(expected: TensorFiles) -> list[dict[str, StoredTensor]]:
    """The headers of files of one kind.

    Raises:
        OSError: a file is missing or cannot be read.
        CheckpointError: the first tensor or file that is not what ``config.json`` says.
    """
    refuse(expected.unlisted())
    headers = [header_of(file) for file in expected.files]
    for file, header in zip(expected.files, headers, strict=True):
        refuse(expected.misfits(file, described(header)))
    refuse(expected.missing())
    return headers


def _by_number(
    numbers: Mapping[str, int], headers: Sequence[Mapping[str, StoredTensor]]
) -> dict[int, StoredTensor]:
    return {numbers[name]: tensor for header in headers for name, tensor in header.items()}
