"""Models to read ranges of elements from, whatever they are stored as."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import ClassVar, Protocol

from torch import Tensor

from condu.checkpoint.safetensors_source import SafetensorsSource
from condu.checkpoint.tensor_files import Stored

_OF_TORCH = (b"PK\x03\x04", b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05")


class Source(Protocol):
    """A model, or what one differs by from another, to read ranges of.

    where: as the user named it.
    is_delta: values are differences from the base; a tensor that is not listed did not change.
    folder: the folder of a whole model, whose other files (configuration, tokenizer) belong to it;
        None of files that were named, and of adapters.
    staged: bytes that the first ``read`` copies into a file of their own, if it has to.
    largest_part: bytes that are in memory together then, at most.
    """

    where: str
    is_delta: ClassVar[bool]

    @property
    def folder(self) -> Path | None: ...
    @property
    def staged(self) -> int: ...
    @property
    def largest_part(self) -> int: ...

    @property
    def tensors(self) -> Mapping[str, Stored]:
        """All tensors by name, integer ones too, in the order of their places in the files."""
        ...

    @property
    def files(self) -> Sequence[Path]:
        """The files that values are read from."""
        ...

    def read(self, name: str, start: int, stop: int, out: Tensor) -> None:
        """Elements [start, stop) of a tensor, in row-major order, into the first of ``out``: flat,
        on the CPU, of the tensor's dtype. In any number of threads; the bits do not depend on how
        a tensor is cut into ranges.

        Raises:
            OSError: the file cannot be read, or became shorter.
        """
        ...

    def close(self) -> None: ...


def open_source(
    where: str | os.PathLike[str],
    *,
    base: Source | None = None,
    allow_pickle: bool = False,
    scratch: Path | None = None,
) -> Source:
    """Open a model: its names, shapes and dtypes are read and checked, no values yet.

    where: a file of safetensors or of ``torch.save``; a folder of Hugging Face, of a PEFT adapter,
        whose values are what it adds to the base, or of torch.distributed.checkpoint; or, if there
        is no such path, "org/name" or "org/name@revision" of the Hugging Face hub.
    base: the model that an adapter is for: the adapter's weights are named as in its files.
    allow_pickle: files of ``torch.save`` and torch.distributed.checkpoint may be read.
    scratch: folder for a copy of a model that cannot be read by ranges where it is
        (torch.distributed.checkpoint); the system's folder for temporary files if None.

    Raises:
        OSError: it does not exist or cannot be read.
        ValueError: it holds no model that can be read, or a damaged one; or is pickled and that is
            not allowed.
    """
    name, path = os.fspath(where), Path(where)
    if not name:
        raise ValueError("the name of a model is empty")
    if not path.exists():
        from condu.checkpoint.hub import download

        path = download(name, allow_pickle=allow_pickle)
    if path.is_dir():
        return _open_folder(name, path, base, allow_pickle, scratch)
    if not path.is_file():
        raise ValueError(f"{path}: is neither a file nor a folder")
    if _is_pickle(path):
        from condu.checkpoint.pickles import PickledSource

        return PickledSource(name, [path], allow_pickle=allow_pickle)
    return SafetensorsSource(name, [path])


def _open_folder(
    where: str, folder: Path, base: Source | None, allow_pickle: bool, scratch: Path | None
) -> Source:
    # the libraries behind these are slow to import, and peft is not everywhere
    if (folder / "adapter_config.json").is_file():
        from condu.checkpoint.adapter_source import AdapterSource

        return AdapterSource(where, folder, base)
    if (folder / ".metadata").is_file():
        from condu.checkpoint.dcp import DistributedSource

        return DistributedSource(where, folder, allow_pickle=allow_pickle, scratch=scratch)
    if source := SafetensorsSource.of_folder(where, folder):
        return source
    from condu.checkpoint.pickles import PickledSource

    if pickled := PickledSource.of_folder(where, folder, allow_pickle=allow_pickle):
        return pickled
    found = ", ".join(sorted(path.name for path in folder.iterdir())[:8])
    raise ValueError(
        f"{folder}: holds no model: neither safetensors files nor an adapter or a checkpoint of"
        f" torch, but {found or 'nothing at all'}"
    )


def _is_pickle(file: Path) -> bool:
    """Whether a file is of torch.save: a zip file, or a bare pickle before torch 1.6."""
    with open(file, "rb") as stream:
        start = stream.read(9)
    # a safetensors header whose length begins like a pickle has its brace after it
    return start.startswith(_OF_TORCH) and start[8:] != b"{"
