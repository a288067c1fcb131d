"""Models to read ranges of elements from, whatever they are stored as."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import ClassVar, Protocol

import torch
from torch import Tensor

from condu.checkpoint.safetensors_source import SafetensorsSource


class Stored(Protocol):
    """What is known of a tensor before it is read."""

    @property
    def name(self) -> str: ...
    @property
    def dtype(self) -> torch.dtype: ...
    @property
    def shape(self) -> tuple[int, ...]: ...
    @property
    def numel(self) -> int: ...
    @property
    def nbytes(self) -> int: ...


class Source(Protocol):
    """A model, or what one differs by from another, to read ranges of.

    where: as the user named it.
    is_delta: values are differences from the base; a tensor that is not listed did not change.
    """

    where: str
    is_delta: ClassVar[bool]

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
    where: str | os.PathLike[str], *, allow_pickle: bool = False, scratch: Path | None = None
) -> Source:
    """Open a model: its names, shapes and dtypes are read and checked, no values yet.

    where: a safetensors file or a Hugging Face folder.

    Raises:
        OSError: it does not exist or cannot be read.
        ValueError: it holds no model that can be read, or a damaged one.
    """
    path = Path(where)
    if path.is_dir():
        source = SafetensorsSource.of_folder(str(where), path)
        if source is None:
            raise ValueError(f"{path}: holds no weights")
        return source
    return SafetensorsSource(str(where), [path])
