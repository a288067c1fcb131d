"""Memory of one worker, taken once and dealt out anew for every unit."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from condu_ext.layout import offsets
from condu_ext.ranges import StateRange

_LINE = 64  # bytes; kernels store whole cache lines


class Room:
    """``size`` bytes on the CPU; page-locked with ``pin``, for copies to a GPU."""

    def __init__(self, size: int, *, pin: bool = False) -> None:
        self.size = size
        self._memory = torch.empty(size + _LINE, dtype=torch.uint8, pin_memory=pin)
        self._start = -self._memory.data_ptr() % _LINE
        self._taken = self._start

    def clear(self) -> None:
        """What was taken may be overwritten from here on."""
        self._taken = self._start

    def take(self, numel: int, dtype: torch.dtype) -> Tensor:
        """A flat tensor, on a cache line of its own; its values are arbitrary."""
        start, end = self._taken, self._taken + numel * dtype.itemsize
        if end > self._memory.numel():
            raise MemoryError(
                f"a unit needs more than the {self._memory.numel()} bytes of its room"
            )
        self._taken = self._start - (self._start - end) // _LINE * _LINE
        return self._memory[start:end].view(dtype)

    def state(self, numels: Sequence[int], tasks: int, dtype: torch.dtype) -> StateRange:
        """Memory for ranges of a state."""
        size = offsets(numels)[1]
        planes = [self.take(size // 8, torch.uint8) for _ in range(tasks)]
        return StateRange(self.take(size, dtype), planes)
