"""Peak resident memory of a block of code, from the kernel's own high-water mark."""

from __future__ import annotations

import ctypes
import gc
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path


@dataclass
class Peak:
    """Bytes above the resident size at the start, at the highest point."""

    extra: int = 0


def _status(key: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(key + ":"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/self/status has no {key}")


@contextmanager
def peak_memory() -> Iterator[Peak]:
    """Measures the block: the high-water mark is reset at its start and read at its end."""
    gc.collect()
    # What earlier code freed but the allocator kept would hide new allocations.
    ctypes.CDLL(None).malloc_trim(0)
    peak = Peak()
    Path("/proc/self/clear_refs").write_text("5")
    before = _status("VmRSS")
    yield peak
    peak.extra = _status("VmHWM") - before
