"""Tables on the device that tell the CUDA kernels where a model's tensors lie.

A table lists the chunks (:mod:`condu_ext.layout`), sorted by kind, then for each model and tensor
its address and its dtype; csrc/condu_cuda.h gives the meaning. It depends on addresses, sizes and
dtypes alone: a cache finds the one of an earlier call with the same tensors, so that training loops
and captured CUDA graphs copy nothing to the device.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from condu_ext import _C
from condu_ext.layout import CHUNK, offsets

_CHUNK_DTYPE = np.dtype(  # condu_chunk
    [("start", "<i8"), ("arena", "<i8"), ("id", "<i8"), ("tensor", "<i4"), ("elements", "<i4")]
)
_GENERAL, _KINDS = 3, 4  # condu_kind
VECTOR = 16  # bytes of one load, and the alignment that it needs


@dataclass
class Table:
    """``work`` points into ``memory``; ``ready`` follows the copy that filled it."""

    memory: Tensor
    ready: torch.cuda.Event | None
    work: _C.Work
    chunks: int


def pack(
    numels: Sequence[int], pointers: NDArray[np.uint64], codes: NDArray[np.uint8]
) -> tuple[NDArray[np.uint8], list[int]]:
    """The bytes of a table, and how many chunks of each kind it lists.

    Args:
        pointers, codes: address and condu_dtype, [models, tensors].

    Raises:
        ValueError: a tensor with elements, but without memory.
    """
    numel = np.array(numels, dtype=np.int64)
    if ((pointers == 0) & (numel > 0)).any():
        raise ValueError("a tensor has no memory (is it fake or on the meta device?)")
    counts = (numel + CHUNK - 1) // CHUNK
    tensor = np.repeat(np.arange(len(numel)), counts)
    number = np.arange(len(tensor))
    start = (number - (np.cumsum(counts) - counts)[tensor]) * CHUNK
    chunks = np.zeros(len(tensor), dtype=_CHUNK_DTYPE)
    chunks["start"], chunks["id"], chunks["tensor"] = start, number, tensor
    chunks["arena"] = np.array(offsets(numels)[0], dtype=np.int64)[tensor] + start
    chunks["elements"] = np.minimum(CHUNK, numel[tensor] - start)

    kind = np.zeros(len(tensor), dtype=np.int64)
    if len(pointers):  # without models only arenas are read, which are always aligned
        plain = (codes == codes[0]).all(0) & (codes[0] < _GENERAL)
        plain &= (pointers % VECTOR == 0).all(0)
        kind = np.where(plain, codes[0], _GENERAL)[tensor]
        kind = np.where(chunks["elements"] % 8 == 0, kind, _GENERAL)
    order = np.argsort(kind, kind="stable")
    parts = (chunks[order], pointers, codes)
    packed = np.concatenate([np.ascontiguousarray(p).reshape(-1).view(np.uint8) for p in parts])
    return packed, np.bincount(kind, minlength=_KINDS).tolist()


def upload(packed: NDArray[np.uint8], device: torch.device) -> tuple[Tensor, torch.cuda.Event]:
    """A copy on the device, made on its current stream, and an event behind it."""
    pinned = torch.from_numpy(packed).pin_memory()  # kept by torch until the copy is done
    memory = pinned.to(device, non_blocking=True)
    ready = torch.cuda.Event()
    ready.record(torch.cuda.current_stream(device))
    return memory, ready


def is_capturing(device: torch.device) -> bool:
    """Whether the device's current stream records a CUDA graph."""
    with torch.cuda.device(device):
        return torch.cuda.is_current_stream_capturing()


class TableCache:
    """The tables that were used last, and for good those that a captured graph reads."""

    def __init__(self, capacity: int = 16) -> None:
        self._capacity = capacity
        self._recent: OrderedDict[tuple[object, ...], Table] = OrderedDict()
        self._captured: dict[tuple[object, ...], Table] = {}
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self._recent)

    def get(
        self,
        device: torch.device,
        numels: Sequence[int],
        pointers: NDArray[np.uint64],
        codes: NDArray[np.uint8],
    ) -> Table:
        """The table of these tensors, ready for the device's current stream.

        Raises:
            RuntimeError: a graph is being captured and there is no such table yet.
        """
        key = (device, pointers.shape, pointers.tobytes(), codes.tobytes(), tuple(numels))
        capturing = is_capturing(device)
        with self._lock:
            table = self._captured.get(key) or self._recent.get(key)
            if table is None:
                if capturing:
                    raise RuntimeError(
                        "a CUDA graph is being captured, but these tensors were not used before: "
                        "call once with the same tensors, then capture"
                    )
                table = self._new(device, numels, pointers, codes)
            self._recent[key] = table
            self._recent.move_to_end(key)
            if capturing:
                self._captured[key] = table
            while len(self._recent) > self._capacity:
                self._recent.popitem(last=False)
        if table.ready is not None and not capturing:  # a capture begins with nothing pending
            stream = torch.cuda.current_stream(device)
            stream.wait_event(table.ready)
            table.memory.record_stream(stream)
        return table

    def _new(
        self,
        device: torch.device,
        numels: Sequence[int],
        pointers: NDArray[np.uint64],
        codes: NDArray[np.uint8],
    ) -> Table:
        packed, kinds = pack(numels, pointers, codes)
        memory, ready = upload(packed, device)
        work = _C.Work(memory.data_ptr(), len(numels), len(pointers), kinds)
        return Table(memory, ready, work, sum(kinds))


TABLES = TableCache()
