"""Memory: how much there is, and how much a block of code takes at its highest point."""

from __future__ import annotations

import ctypes
import gc
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import torch

_CGROUP = Path("/sys/fs/cgroup")
_CLEAR = Path("/proc/self/clear_refs")  # "5" lets the mark VmHWM begin anew
_STATUS = Path("/proc/self/status")


def available_memory(device: torch.device) -> int:
    """Bytes that can still be allocated on a device: on a CPU what the kernel holds available, or
    what the control group (version 2) still allows if that is less. A group's page cache does not
    count as used: it gives way."""
    if device.type == "cuda":
        free = torch.cuda.mem_get_info(device)[0]
        kept = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return int(free + kept)
    try:
        free = _value(Path("/proc/meminfo"), "MemAvailable")
    except OSError:  # not Linux
        free = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    try:
        limit = int((_CGROUP / "memory.max").read_text())
        used = int((_CGROUP / "memory.current").read_text())
        pairs = (line.split() for line in (_CGROUP / "memory.stat").read_text().splitlines())
        held = {key: int(value) for key, value in pairs}
    except (OSError, ValueError):  # no such file, or "max"
        return free
    cache = held.get("inactive_file", 0) + held.get("active_file", 0)
    return min(free, limit - (used - cache))


@dataclass
class Peak:
    """Bytes above what was held at the start, at the highest point; None where the system does not
    let a process reset its high-water mark."""

    extra: int | None = None


@contextmanager
def peak_memory(device: torch.device) -> Iterator[Peak]:
    """Measures the block: on a CPU the resident size, by the kernel's own high-water mark; on a
    GPU what torch's allocator has handed out."""
    gc.collect()
    peak = Peak()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        yield peak
        torch.cuda.synchronize(device)
        peak.extra = torch.cuda.max_memory_allocated(device) - before
        return
    try:
        # What earlier code freed but the allocator kept would hide new allocations.
        ctypes.CDLL(None).malloc_trim(0)
        _CLEAR.write_text("5")
    except (OSError, AttributeError):  # another C library, not Linux, or not allowed
        yield peak
        return
    before = _value(_STATUS, "VmRSS")
    yield peak
    peak.extra = _value(_STATUS, "VmHWM") - before


def restart_peaks(device: torch.device) -> None:
    """Let `peaks` begin anew, as far as the system lets it."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    with suppress(OSError):  # not Linux, or not allowed
        _CLEAR.write_text("5")


def peaks(device: torch.device) -> tuple[int | None, int | None]:
    """The most bytes at a time that this process had resident in host memory, since
    `restart_peaks` or, where the kernel does not let it begin anew, since the process began; and
    that torch's allocator had handed out on a GPU. None: not Linux; not a GPU."""
    try:
        host = _value(_STATUS, "VmHWM")
    except OSError:
        host = None
    return host, torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None


def _value(file: Path, key: str) -> int:
    """Bytes behind a key of a file of /proc that counts in kB."""
    for line in file.read_text().splitlines():
        if line.startswith(key + ":"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"{file} has no {key}")
