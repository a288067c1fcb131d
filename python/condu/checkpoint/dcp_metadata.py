"""What a folder of torch.distributed.checkpoint (DCP) says of itself, read without running code.

``.metadata`` is a pickle. torch would let it run anything; here it makes metadata or is refused.
"""

from __future__ import annotations

import math
import pickle
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata

from condu.checkpoint.pickles import UNDER, reason
from condu.checkpoint.safetensors_source import stays_inside
from condu.live import canonical_name

METADATA = ".metadata"
_OF_METADATA = "torch.distributed.checkpoint.metadata"
# all that the file system's writer puts into it, dtypes aside
_CLASSES = {
    *((_OF_METADATA, f"{kind}StorageMetadata") for kind in ("Tensor", "Bytes", "Chunk")),
    *((_OF_METADATA, name) for name in ("Metadata", "MetadataIndex", "StorageMeta")),
    *((_OF_METADATA, name) for name in ("TensorProperties", "_MEM_FORMAT_ENCODING")),
    ("torch.distributed.checkpoint.filesystem", "_StorageInfo"),
    ("torch.serialization", "_get_layout"),
    ("torch", "Size"),
    ("pathlib", "PosixPath"),
    ("collections", "OrderedDict"),
}


class MetadataReader(FileSystemReader):
    """Reads a folder's metadata once, and its data as torch does, with ``weights_only=True``.

    Raises:
        OSError: the metadata, or a file that they name, is missing or cannot be read.
        ValueError: damaged metadata; they name files outside the folder.
    """

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self._folder = folder
        file = folder / METADATA
        try:
            with open(file, "rb") as stream:
                self._metadata = _checked(_Unpickler(stream).load())
        except OSError:
            raise
        except Exception as error:  # a damaged pickle can fail as anything
            raise ValueError(f"{file}: is no metadata ({reason(error)})") from None
        self.files = [file, *(folder / name for name in self._data_files())]

    def read_metadata(self, *_: Any, **__: Any) -> Metadata:
        return self._metadata

    def model(self) -> dict[str, tuple[str, TensorStorageMetadata]]:
        """By a tensor's name in the model, its name in the folder and what it is.

        Raises:
            ValueError: there are no tensors, or an entry is something else.
        """
        kinds = self._metadata.state_dict_metadata
        found: dict[str, tuple[str, TensorStorageMetadata]] = {}
        for saved, name in self._names().items():
            kind, canonical = kinds[saved], canonical_name(name)
            if not isinstance(kind, TensorStorageMetadata):
                raise ValueError(
                    f"{self._folder}: entry {saved!r} is no tensor; a model is tensors by name, or"
                    " has them under 'state_dict' or 'model'"
                )
            if canonical in found:
                raise ValueError(
                    f"{self._folder}: two tensors have the same canonical name {canonical!r}"
                )
            found[canonical] = saved, kind
        if not found:
            raise ValueError(f"{self._folder}: holds no tensors")
        return found

    def _names(self) -> dict[str, str]:
        # what was flattened into which names, unless the planner was told not to
        paths: Mapping[str, Sequence[object]] = self._metadata.planner_data or {}
        for key in UNDER:
            nested = {
                saved: ".".join(map(str, path[1:]))
                for saved, path in paths.items()
                if path[0] == key and len(path) > 1
            }
            if nested:
                return nested
        return {saved: saved for saved in self._metadata.state_dict_metadata}

    def _data_files(self) -> list[str]:
        names = sorted({info.relative_path for info in self._metadata.storage_data.values()})
        for name in names:
            if not stays_inside(name):
                raise ValueError(
                    f"{self._folder / METADATA}: names {name!r}, which is not in its folder"
                )
            if not (self._folder / name).is_file():
                raise FileNotFoundError(f"{self._folder / METADATA}: there is no file {name!r}")
        return names


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        is_dtype = module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)
        if is_dtype or (module, name) in _CLASSES:
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"it asks for {module}.{name}")


def _checked(metadata: Any) -> Metadata:
    """Metadata whose parts of tensors are as large as the tensors; torch would leave holes."""
    for name, kind in metadata.state_dict_metadata.items():
        if isinstance(kind, TensorStorageMetadata):
            parts, whole = sum(math.prod(c.sizes) for c in kind.chunks), math.prod(kind.size)
            if parts != whole:
                raise ValueError(f"{name!r} has {whole} elements, its parts {parts}")
    return metadata
