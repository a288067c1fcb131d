"""The kernels of aligned merging on the CPU.

The functions have the signatures of the registered operators (:mod:`condu_ext._alignment_ops`).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from condu_ext import _C
from condu_ext import _arguments as arguments

_CPU = torch.device("cpu")


def _side(tensors: Sequence[Tensor]) -> tuple[NDArray[np.uint64], NDArray[np.uint8]]:
    return arguments.addresses(tensors, _CPU), arguments.dtype_codes(tensors)


def _pair(written: Sequence[Tensor], read: Sequence[Tensor], what: str) -> tuple[Any, ...]:
    """Sizes, then addresses and dtypes of both sides; ``what`` is read."""
    numels = [t.numel() for t in written]
    arguments.check_same_sizes(numels, read, what)
    return np.array(numels, dtype=np.int64), *_side(written), *_side(read)


def magnitude_threshold(reference: Sequence[Tensor], ranks: Sequence[int]) -> Tensor:
    numels = [t.numel() for t in reference]
    joint = arguments.check_ranks(numels, ranks)
    found = _C.magnitude_threshold(
        np.array(numels, dtype=np.int64),
        *_side(reference),
        np.array(ranks, dtype=np.int64),
        joint,
        torch.get_num_threads(),
    )
    return torch.from_numpy(found)


def align_(
    current: Sequence[Tensor], reference: Sequence[Tensor], threshold: Tensor, to_reference: bool
) -> Tensor:
    limits = arguments.check_thresholds(threshold, len(current)).numpy()
    conflicts = _C.align(
        *_pair(current, reference, "reference"), limits, to_reference, torch.get_num_threads()
    )
    return torch.tensor(conflicts, dtype=torch.int64, device="cpu")


def average_(reference: Sequence[Tensor], current: Sequence[Tensor], weight: float) -> None:
    _C.average(*_pair(reference, current, "current"), weight, torch.get_num_threads())
