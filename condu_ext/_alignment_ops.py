"""The kernels of aligned merging as PyTorch operators ``torch.ops.condu.*``: schema, fake and CPU
implementation.

They work on flat, contiguous tensors of one device, of float32, bfloat16 or float16, and are what
``torch.compile(fullgraph=True)`` sees; the API by name is :mod:`condu_ext.alignment`. Arguments
must not share memory with what is written.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.library import Library

from condu_ext import _C, _native

_LIBRARY = Library("condu", "FRAGMENT")

_SCHEMAS = {
    "magnitude_threshold": "(Tensor[] reference, int[] ranks) -> Tensor",
    "align_": "(Tensor(a!)[] current, Tensor[] reference, Tensor threshold, bool to_reference)"
    " -> Tensor",
    "average_": "(Tensor(a!)[] reference, Tensor[] current, float weight) -> ()",
}


def _numels(tensors: Sequence[Tensor]) -> NDArray[np.int64]:
    return np.array([t.numel() for t in tensors], dtype=np.int64)


def _pair(a: Sequence[Tensor], b: Sequence[Tensor]) -> tuple[NDArray[Any], ...]:
    """Sizes, then addresses and dtypes of both sides."""
    sizes = _numels(a)
    if not np.array_equal(sizes, _numels(b)):
        raise ValueError(
            f"reference and current have tensors of {sizes.tolist()} and "
            f"{_numels(b).tolist()} elements"
        )
    sides = (_native._addresses(a), _native._dtypes(a), _native._addresses(b), _native._dtypes(b))
    return sizes, *sides


def _magnitude_threshold(reference: Sequence[Tensor], ranks: Sequence[int]) -> Tensor:
    """float32 [len(ranks)]: of each tensor the ranks[k]-th largest magnitude, or with one rank that
    of all tensors together. Rank 0 gives +infinity; NaN or infinity among the values, NaN."""
    sizes = _numels(reference)
    if len(ranks) not in (1, len(sizes)):
        raise ValueError(f"{len(ranks)} ranks for {len(sizes)} tensors: give one each, or one")
    counts = sizes if len(ranks) == len(sizes) else sizes.sum(keepdims=True)
    for rank, count in zip(ranks, counts.tolist(), strict=True):
        if not 0 <= rank <= count:
            raise ValueError(f"rank {rank} of {count} elements")
    found = _C.magnitude_threshold(
        sizes,
        _native._addresses(reference),
        _native._dtypes(reference),
        np.array(ranks, dtype=np.int64),
        len(ranks) != len(sizes),
        torch.get_num_threads(),
    )
    return torch.from_numpy(found)


def _align_(
    current: Sequence[Tensor], reference: Sequence[Tensor], threshold: Tensor, to_reference: bool
) -> Tensor:
    """int64 []: how many elements of ``current`` were changed; ``threshold`` float32 [tensors]."""
    if threshold.dtype != torch.float32 or threshold.shape != (len(current),):
        raise ValueError(
            f"threshold is {threshold.dtype} {tuple(threshold.shape)}, "
            f"expected float32 ({len(current)},)"
        )
    conflicts = _C.align(
        *_pair(current, reference),
        threshold.contiguous().numpy(),
        to_reference,
        torch.get_num_threads(),
    )
    return torch.tensor(conflicts, dtype=torch.int64, device="cpu")


def _average_(reference: Sequence[Tensor], current: Sequence[Tensor], weight: float) -> None:
    """reference ← weight·reference + (1 − weight)·current."""
    _C.average(*_pair(reference, current), weight, torch.get_num_threads())


def _fake_magnitude_threshold(reference: Sequence[Tensor], ranks: Sequence[int]) -> Tensor:
    return reference[0].new_empty(len(ranks), dtype=torch.float32)


def _fake_align_(current: Sequence[Tensor], *_: Any) -> Tensor:
    return current[0].new_empty((), dtype=torch.int64)


def _fake_average_(*_: Any) -> None:
    return None


_IMPLEMENTATIONS: dict[str, tuple[Callable[..., Any], Callable[..., Any]]] = {
    "magnitude_threshold": (_magnitude_threshold, _fake_magnitude_threshold),
    "align_": (_align_, _fake_align_),
    "average_": (_average_, _fake_average_),
}

for _name, (_kernel, _fake) in _IMPLEMENTATIONS.items():
    _LIBRARY.define(_name + _SCHEMAS[_name])
    _LIBRARY.impl(_name, _kernel, "CPU")
    torch.library.register_fake(f"condu::{_name}", _fake, lib=_LIBRARY)

magnitude_threshold = torch.ops.condu.magnitude_threshold.default
align_ = torch.ops.condu.align_.default
average_ = torch.ops.condu.average_.default
