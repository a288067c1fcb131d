"""Safetensors files as ranges of bytes: where each tensor lies, reading a part of one, and the
header of a file that is written piece by piece.

The safetensors library reads and writes whole tensors, or rows of them. Streaming needs the place
of every element, so the header is parsed here as well, after the library found it valid: it refuses
truncated files and offsets that overlap or leave holes.
Format: 8 bytes (little-endian length of the header), the header (JSON, padded with spaces), data.
"""

from __future__ import annotations

import itertools
import json
import math
import os
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

_ALIGN = 8
PIECE = 1 << 20  # elements that are read at a time
_OPEN_FILES = 256  # at most, of all readers
_METADATA = "__metadata__"
_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U64": torch.uint64,
    "U32": torch.uint32,
    "U16": torch.uint16,
    "U8": torch.uint8,
    "BOOL": torch.bool,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "C64": torch.complex64,
}
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}


@dataclass(frozen=True)
class Stored:
    """What is known of a tensor before it is read."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        return self.numel * self.dtype.itemsize


@dataclass(frozen=True)
class StoredTensor(Stored):
    """A tensor in a file: its elements in row-major order begin at byte ``offset`` of it."""

    file: Path
    offset: int


def read_header(file: Path) -> dict[str, StoredTensor]:
    """The tensors of a safetensors file, in the order of their places.

    Raises:
        OSError: there is no such file, or it cannot be read.
        ValueError: not a valid safetensors file: truncated, overlapping offsets, and so on; or a
            dtype that is not known here.
    """
    with open(file, "rb") as stream:  # an OSError that names the file
        try:
            safe_open(file, framework="pt")
        except SafetensorError as error:
            raise ValueError(f"{file}: not a valid safetensors file ({error})") from None
        length = int.from_bytes(stream.read(8), "little")
        values = json.loads(stream.read(length))
    values.pop(_METADATA, None)
    found = []
    for name, value in values.items():
        if value["dtype"] not in _DTYPES:
            raise ValueError(f"{file}: tensor {name!r} has the unknown dtype {value['dtype']!r}")
        dtype, shape = _DTYPES[value["dtype"]], tuple(value["shape"])
        found.append(StoredTensor(name, dtype, shape, file, 8 + length + value["data_offsets"][0]))
    return {tensor.name: tensor for tensor in sorted(found, key=lambda t: (t.offset, t.nbytes))}


def read_metadata(file: Path) -> dict[str, str]:
    """The free text of a file's header, such as ``{"format": "pt"}``."""
    with safe_open(file, framework="pt") as handle:
        return dict(handle.metadata() or {})


def new_header(
    file: Path,
    tensors: Sequence[tuple[str, torch.dtype, tuple[int, ...]]],
    metadata: Mapping[str, str] | None = None,
) -> tuple[bytes, dict[str, StoredTensor], int]:
    """The first bytes of a file that will hold these tensors one after another.

    Returns:
        The header; where each tensor goes; the size of the whole file in bytes.
    """
    values: dict[str, object] = {_METADATA: dict(metadata)} if metadata else {}
    places: dict[str, int] = {}
    end = 0
    for name, dtype, shape in tensors:
        places[name] = end
        start, end = end, end + math.prod(shape) * dtype.itemsize
        values[name] = {"dtype": _NAMES[dtype], "shape": shape, "data_offsets": [start, end]}
    text = json.dumps(values, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % _ALIGN)
    header = len(text).to_bytes(8, "little") + text
    stored = {
        name: StoredTensor(name, dtype, tuple(shape), file, len(header) + places[name])
        for name, dtype, shape in tensors
    }
    return header, stored, len(header) + end


def as_bytes(flat: Tensor) -> memoryview:
    """The memory of a contiguous flat tensor on the CPU."""
    return flat.view(torch.uint8).numpy().data


def pieces(
    read: Callable[[int, int, Tensor], None], tensor: Stored
) -> Iterator[tuple[int, Tensor]]:
    """A tensor from its first element to its last, ``PIECE`` at a time: where each piece begins,
    and its elements, flat, in memory that the next piece overwrites. ``read`` puts the elements
    [start, stop) into a tensor."""
    memory = torch.empty(min(PIECE, tensor.numel), dtype=tensor.dtype)
    for start in range(0, tensor.numel, PIECE):
        stop = min(start + PIECE, tensor.numel)
        read(start, stop, memory)
        yield start, memory[: stop - start]


def seen(files: Sequence[str | os.PathLike[str]]) -> list[tuple[str, int, int]]:
    """Input files as a journal knows them: path, size and time of the last change."""
    found = []
    for file in files:
        status = os.stat(file)
        found.append((os.path.realpath(file), status.st_size, status.st_mtime_ns))
    return found


def has_nan(values: Tensor) -> bool:
    """Whether a value of a tensor of any dtype is NaN."""
    if not (values.is_floating_point() or values.is_complex()):
        return False
    if values.dtype.itemsize == 1:  # torch asks no float8 itself
        values = values.float()
    return bool(values.isnan().any())


class FileReader:
    """Files to read parts of tensors from, in any number of threads; closed as one.

    The latest used, of all readers, stay open: there are more tasks than files that a process may
    have open, each with files of its own.
    """

    def __init__(self) -> None:
        self._number = next(_numbers)

    def read(self, tensor: StoredTensor, start: int, stop: int, out: Tensor) -> None:
        """Elements [start, stop) of a tensor into ``out``, flat and of its dtype.

        Raises:
            OSError: the file cannot be read, or became shorter.
        """
        size = tensor.dtype.itemsize
        self.read_bytes(tensor.file, tensor.offset + start * size, as_bytes(out[: stop - start]))

    def read_bytes(self, file: Path, offset: int, into: memoryview) -> None:
        """Fill ``into`` with the bytes of a file from ``offset`` on."""
        descriptor = self._descriptor(file)  # open until its last reader lets go of it
        while into:
            count = os.preadv(descriptor.number, [into], offset)
            if count == 0:
                raise OSError(f"{file}: ends at byte {offset}, was it changed meanwhile?")
            into, offset = into[count:], offset + count

    def close(self) -> None:
        with _lock:
            for key in [key for key in _open if key[0] == self._number]:
                del _open[key]

    def __enter__(self) -> FileReader:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _descriptor(self, file: Path) -> _Descriptor:
        key = self._number, file
        with _lock:
            if key not in _open:
                _open[key] = _Descriptor(file)
            _open.move_to_end(key)
            if len(_open) > _OPEN_FILES:
                _open.popitem(last=False)
            return _open[key]


class _Descriptor:
    """A file that is closed with the last reference to it."""

    def __init__(self, file: Path) -> None:
        self.number = os.open(file, os.O_RDONLY)

    def __del__(self) -> None:
        if hasattr(self, "number"):
            os.close(self.number)


_numbers = itertools.count()
_open: OrderedDict[tuple[int, Path], _Descriptor] = OrderedDict()
"""The open files, by number of the reader and name; the latest used is the last one."""
_lock = threading.Lock()
