"""The kernels of aligned merging on CUDA: the counterpart of :mod:`condu_ext._alignment_native`.

Work is queued on the device's current stream and nothing waits for it. A CUDA graph can capture
``align_`` and ``average_`` once they were called with the same tensors (:mod:`condu_ext._tables`).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from condu_ext import _C, _cuda, _tables
from condu_ext import _arguments as arguments


def _table(
    device: torch.device, written: Sequence[Tensor], read: Sequence[Tensor] = ()
) -> _tables.Table:
    """The table of one adapter, or of two; to be held until the launch."""
    numels, tensors = [t.numel() for t in written], [*written, *read]
    shape = (2 if read else 1, len(numels))
    pointers = arguments.addresses(tensors, device).reshape(shape)
    codes = arguments.dtype_codes(tensors).reshape(shape)
    return _tables.TABLES.get(device, numels, pointers, codes)


def _place(device: torch.device, workspace: Tensor | None = None) -> _C.Place:
    address = 0 if workspace is None else workspace.data_ptr()
    return _C.Place(device.index or 0, _cuda._stream(device), address)


def magnitude_threshold(reference: Sequence[Tensor], ranks: Sequence[int]) -> Tensor:
    joint = arguments.check_ranks([t.numel() for t in reference], ranks)
    device = reference[0].device
    if _tables.is_capturing(device):
        raise RuntimeError("magnitude_threshold cannot be captured: call it before the CUDA graph")
    table = _table(device, reference)
    on_device, _ = _tables.upload(np.array(ranks, dtype=np.int64).view(np.uint8), device)
    # Freed when the call returns; memory that the stream still uses goes to later work on it.
    size = _C.cuda_threshold_workspace(len(ranks))
    workspace = torch.empty(size, dtype=torch.uint8, device=device)
    threshold = torch.empty(len(ranks), dtype=torch.float32, device=device)
    _C.cuda_magnitude_threshold(
        _place(device, workspace), table.work, joint, on_device.data_ptr(), threshold.data_ptr()
    )
    return threshold


def align_(
    current: Sequence[Tensor], reference: Sequence[Tensor], threshold: Tensor, to_reference: bool
) -> Tensor:
    device = current[0].device
    limits = arguments.check_thresholds(threshold, len(current))
    arguments.check_same_sizes([t.numel() for t in current], reference, "reference")
    [address] = arguments.addresses([limits], device)
    table = _table(device, current, reference)
    conflicts = torch.zeros((), dtype=torch.int64, device=device)
    _C.cuda_align(_place(device), table.work, int(address), to_reference, conflicts.data_ptr())
    return conflicts


def average_(reference: Sequence[Tensor], current: Sequence[Tensor], weight: float) -> None:
    device = reference[0].device
    arguments.check_same_sizes([t.numel() for t in reference], current, "current")
    table = _table(device, reference, current)
    _C.cuda_average(_place(device), table.work, weight)
