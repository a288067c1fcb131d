"""The kernels of aligned merging as PyTorch operators ``torch.ops.condu.*``: schema, fake, CPU and
CUDA implementation.

They work on flat, contiguous tensors of one device, of float32, bfloat16 or float16, and are what
``torch.compile(fullgraph=True)`` sees; the API by name is :mod:`condu_ext.alignment`. Arguments
must not share memory with what is written.

``magnitude_threshold`` gives float32 [len(ranks)]: of each tensor the ranks[k]-th largest
magnitude, or with one rank for several tensors that of all of them together. Rank 0 gives
+infinity; NaN or infinity among the values, NaN. ``align_`` takes thresholds float32 [tensors] and
gives, as int64 [], how many elements of ``current`` it changed. ``average_`` is reference ←
weight·reference + (1 − weight)·current.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.library import Library

from condu_ext import _alignment_cuda, _alignment_native
from condu_ext._register import register

_LIBRARY = Library("condu", "FRAGMENT")

_SCHEMAS = {
    "magnitude_threshold": "(Tensor[] reference, int[] ranks) -> Tensor",
    "align_": "(Tensor(a!)[] current, Tensor[] reference, Tensor threshold, bool to_reference)"
    " -> Tensor",
    "average_": "(Tensor(a!)[] reference, Tensor[] current, float weight) -> ()",
}


def _fake_magnitude_threshold(reference: Sequence[Tensor], ranks: Sequence[int]) -> Tensor:
    return reference[0].new_empty(len(ranks), dtype=torch.float32)


def _fake_align_(current: Sequence[Tensor], *_: Any) -> Tensor:
    return current[0].new_empty((), dtype=torch.int64)


def _fake_average_(*_: Any) -> None:
    return None


_FAKES: dict[str, Callable[..., Any]] = {
    "magnitude_threshold": _fake_magnitude_threshold,
    "align_": _fake_align_,
    "average_": _fake_average_,
}

register(_LIBRARY, _SCHEMAS, _FAKES, _alignment_native, _alignment_cuda)

magnitude_threshold = torch.ops.condu.magnitude_threshold.default
align_ = torch.ops.condu.align_.default
average_ = torch.ops.condu.average_.default
