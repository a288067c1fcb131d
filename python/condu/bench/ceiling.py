"""The ceiling: how fast this machine copies memory at this moment.

On a CPU a copy with non-temporal stores, which do not read the target first; on a GPU torch's copy
from the device to itself. The rate counts bytes read and bytes written.
"""

from __future__ import annotations

import mmap
from pathlib import Path

import torch
from torch import Tensor

from condu_ext import _C

LEAST = {"cpu": 64 << 20, "cuda": 1 << 30}
"""Bytes of a copy at the least: on a GPU so many that launching it costs nothing beside it."""
HUGE_PAGES = Path("/sys/kernel/mm/transparent_hugepage/enabled")


def cache_bytes(device: torch.device) -> int:
    """Size of the last-level cache; 0 where the system does not say."""
    if device.type == "cuda":
        return int(getattr(torch.cuda.get_device_properties(device), "L2_cache_size", 0))
    sizes = Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size")
    return max((_bytes(file.read_text().strip()) for file in sizes), default=0)


def huge_pages() -> str | None:
    """Whether the system gives huge pages, with the choice in brackets; None where it has none."""
    try:
        return HUGE_PAGES.read_text().strip()
    except OSError:
        return None


def _buffer(size: int) -> Tensor:
    """float32 in pages that nobody has touched, huge ones where there are: the kernels ask for them
    for a new state, and a copy without would be a slower ceiling."""
    pages = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if huge_pages() is not None:
        pages.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(pages, dtype=torch.float32)


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
        if device.type == "cuda":
            self.source, self.target = torch.empty(2, size // 4, device=device)
        else:
            self.source, self.target = _buffer(size // 4 * 4), _buffer(size // 4 * 4)
        self.source.normal_(generator=generator)
        self.target.zero_()  # touches its pages

    @property
    def moved(self) -> int:
        """Bytes read and written by a call."""
        return 2 * self.source.nbytes

    @property
    def how(self) -> str:
        """What copies, for the record."""
        on_gpu = self.source.is_cuda
        return "torch.Tensor.copy_ on the device" if on_gpu else "non-temporal stores"

    def __call__(self) -> None:
        if self.source.is_cuda:
            self.target.copy_(self.source)
            return
        _C.copy(
            self.target.data_ptr(),
            self.source.data_ptr(),
            self.source.nbytes,
            torch.get_num_threads(),
        )
