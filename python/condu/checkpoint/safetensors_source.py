"""A model in safetensors files: one file, or a Hugging Face folder with or without an index."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import ClassVar

from torch import Tensor

from condu.checkpoint.tensor_files import FileReader, StoredTensor, read_header

WEIGHTS = "*.safetensors"
INDEX = "*.safetensors.index.json"
# what transformers looks for, in its order, before anything else of a folder
_FIRST = "model.safetensors"
_FIRST_INDEX = "model.safetensors.index.json"


class SafetensorsSource:
    """The tensors of safetensors files, read by ranges (a ``condu.checkpoint.sources.Source``).

    folder: of a Hugging Face folder, its path.
    weights: the files, in the order of their names, which is that of their numbers.
    index: the file that names them, if there is one.

    As in transformers, files hold what the model has: a tensor that they hold counts though the
    index may not list it.

    Raises:
        OSError: a file is missing or cannot be read.
        ValueError: a damaged file; an index that is damaged, names files outside its folder, or
            tensors that its files lack; a tensor that two files hold.
    """

    is_delta: ClassVar[bool] = False
    staged: ClassVar[int] = 0
    largest_part: ClassVar[int] = 0

    def __init__(
        self,
        where: str,
        weights: Sequence[Path],
        *,
        folder: Path | None = None,
        index: Path | None = None,
    ) -> None:
        self.where = where
        self.folder = folder
        self.index = index
        self.weights: tuple[Path, ...] = tuple(weights)
        self.tensors: Mapping[str, StoredTensor] = _tensors(self.weights)
        self._reader = FileReader()

    @classmethod
    def of_folder(cls, where: str, folder: Path) -> SafetensorsSource | None:
        """The model in a folder; None if it holds no safetensors files.

        ``model.safetensors``, else ``model.safetensors.index.json`` (so does transformers), else
        the one index, else the one file.

        Raises:
            OSError, ValueError: as the class; or several files and no index says which.
        """
        indexes, files = files_like(folder, INDEX), files_like(folder, WEIGHTS)
        if folder / _FIRST in files:
            return cls(where, [folder / _FIRST], folder=folder)
        if folder / _FIRST_INDEX in indexes:
            indexes = [folder / _FIRST_INDEX]
        if not indexes and not files:
            return None
        if len(indexes) > 1 or (not indexes and len(files) > 1):
            kind = "indexes" if indexes else "safetensors files without an index"
            names = ", ".join(path.name for path in indexes or files)
            raise ValueError(f"{folder}: holds several {kind} ({names}), name the one to read")
        if not indexes:
            return cls(where, files, folder=folder)
        listed = read_index(indexes[0])
        source = cls(where, sorted(set(listed.values())), folder=folder, index=indexes[0])
        held = {name: tensor.file for name, tensor in source.tensors.items()}
        check_listed(indexes[0], listed, held)
        return source

    @property
    def files(self) -> Sequence[Path]:
        return self.weights

    def read(self, name: str, start: int, stop: int, out: Tensor) -> None:
        self._reader.read(self.tensors[name], start, stop, out)

    def close(self) -> None:
        self._reader.close()


def files_like(folder: Path, pattern: str) -> list[Path]:
    """A folder's files whose names match a glob pattern, sorted; hidden ones aside."""
    return sorted(
        path
        for path in folder.iterdir()
        if path.match(pattern) and not path.name.startswith(".") and path.is_file()
    )


def read_index(index: Path) -> dict[str, Path]:
    """The file of each tensor, as an index of Hugging Face says (``weight_map``).

    Raises:
        OSError: the index cannot be read, or a file that it names does not exist.
        ValueError: it is damaged, lists nothing, or names a file outside its folder.
    """
    try:
        content = json.loads(index.read_bytes())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{index}: is no JSON ({error})") from None
    listed = content.get("weight_map") if isinstance(content, dict) else None
    if not isinstance(listed, dict) or not listed:
        raise ValueError(f"{index}: has no weight_map that lists tensors")
    for name, file in listed.items():
        if not isinstance(file, str) or not stays_inside(file):
            raise ValueError(
                f"{index}: the file of tensor {name!r} is {file!r}, not the name of one in its"
                " folder"
            )
        # a link may lead out of the folder: the hub's cache is made of such links
        if not (index.parent / file).is_file():
            raise FileNotFoundError(
                f"{index}: tensor {name!r} is in {file!r}, but there is no such file"
            )
    return {name: index.parent / file for name, file in listed.items()}


def check_listed(index: Path, listed: Mapping[str, Path], held: Mapping[str, Path]) -> None:
    """ValueError unless each tensor is in the file that the index names for it."""
    for name, file in listed.items():
        if held.get(name) != file:
            raise ValueError(f"{index}: lists tensor {name!r} in {file.name!r}, which lacks it")


def stays_inside(file: str) -> bool:
    """Whether a path is relative and leads to no other folder, on any system."""
    return bool(file) and not any(
        path.is_absolute() or path.drive or path.root or ".." in path.parts
        for path in (PurePosixPath(file), PureWindowsPath(file))
    )


def _tensors(files: Sequence[Path]) -> dict[str, StoredTensor]:
    tensors: dict[str, StoredTensor] = {}
    for file in files:
        for name, tensor in read_header(file).items():
            if name in tensors:
                raise ValueError(f"tensor {name!r} is in {tensors[name].file} and in {file}")
            tensors[name] = tensor
    return tensors
