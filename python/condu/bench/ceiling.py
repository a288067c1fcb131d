"""The ceiling: how fast this machine copies memory at this moment.

On a CPU a copy with non-temporal stores, which do not read the target first; on a GPU torch's copy
from the device to itself. The rate counts bytes read and bytes written.
"""

from __future__ import annotations

from pathlib import Path

import torch

from condu_ext import _C

LEAST = {"cpu": 64 << 20, "cuda": 1 << 30}
"""Bytes of a copy at the least: on a GPU so many that launching it costs nothing beside it."""


def cache_bytes(device: torch.device) -> int:
    """Size of the last-level cache; 0 where the system does not say."""
    if device.type == "cuda":
        return int(getattr(torch.cuda.get_device_properties(device), "L2_cache_size", 0))
    sizes = Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size")
    return max((_bytes(file.read_text().strip()) for file in sizes), default=0)


def _bytes(text: str) -> int:
    units = {"K": 1 << 10, "M": 1 << 20, "G": 1 << 30}
    return int(text[:-1]) * units[text[-1]] if text[-1:] in units else int(text)


class Copy:
    """A copy whose source and target are each larger than the last-level cache.

    Run between two calls of a kernel it also drives the kernel's inputs out of the cache, so that
    nobody finds them there.

    Args:
        size: bytes of source and of target; default the last-level cache's, not less than
            :data:`LEAST` and not more than an eighth of the memory.
    """

    def __init__(self, device: torch.device, size: int | None = None, memory: int = 0) -> None:
        if size is None:
            least = LEAST[device.type]
            size = min(max(cache_bytes(device), least), max(memory // 8, 64 << 20))
        generator = torch.Generator(device).manual_seed(7)
        self.source = torch.randn(size // 4, generator=generator, device=device)
        self.target = torch.zeros_like(self.source)  # touches its pages

    @property
    def moved(self) -> int:
        """Bytes read and written by a call."""
        return 2 * self.source.nbytes

    @property
    def how(self) -> str:
        """What copies, for the record."""
        if self.source.is_cuda:
            return "torch.Tensor.copy_ on the device"
        return "non-temporal stores" if hasattr(_C, "copy") else "torch.Tensor.copy_"

    def __call__(self) -> None:
        if not self.source.is_cuda and hasattr(_C, "copy"):
            _C.copy(
                self.target.data_ptr(),
                self.source.data_ptr(),
                self.source.nbytes,
                torch.get_num_threads(),
            )
        else:
            self.target.copy_(self.source)
