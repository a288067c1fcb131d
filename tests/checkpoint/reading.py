"""Reading sources whole and in pieces; what a pickle could do when it is read."""

from __future__ import annotations

import os
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from condu.checkpoint.sources import Source

_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def values(source: Source, name: str, *cuts: int) -> Tensor:
    """A tensor, read in pieces with borders at ``cuts``."""
    stored = source.tensors[name]
    out = torch.empty(stored.numel, dtype=stored.dtype)
    borders = [0, *cuts, stored.numel]
    for start, stop in pairwise(borders):
        source.read(name, start, stop, out[start:stop])
    assert not out.requires_grad
    return out.view(stored.shape)


def assert_same_bits(a: Tensor, b: Tensor) -> None:
    assert (a.dtype, a.shape) == (b.dtype, b.shape)
    view = _BITS[a.dtype.itemsize]
    assert torch.equal(a.contiguous().view(view), b.contiguous().view(view))


class Harm:
    """Makes a folder when its pickle is read."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.target),)
