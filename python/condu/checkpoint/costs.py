"""What a run took, in bytes and seconds."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any


class Costs:
    """Bytes and seconds of a run; the seconds of all workers, added."""

    def __init__(self) -> None:
        self.read = self.written = self.verified = 0
        self.seconds = dict.fromkeys(("verify", "read", "fuse", "write", "check", "sync"), 0.0)
        self.elapsed = self.waited = 0.0
        self.workers = 1
        self._lock = threading.Lock()

    @classmethod
    def together(cls, parts: Sequence[Costs]) -> Costs:
        """Those of a run from those of its processes, which work at the same time."""
        found = cls()
        found.read = sum(part.read for part in parts)
        found.written = sum(part.written for part in parts)
        found.workers = sum(part.workers for part in parts)
        found.verified = max(part.verified for part in parts)  # all of them know of all files
        found.elapsed = max(part.elapsed for part in parts)
        found.waited = max(part.waited for part in parts)
        for what in found.seconds:
            found.seconds[what] = sum(part.seconds[what] for part in parts)
        found.seconds["verify"] = max(part.seconds["verify"] for part in parts)
        return found

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name != "_lock"}

    @contextmanager
    def of(self, what: str) -> Iterator[None]:
        """Time a block."""
        begin = time.perf_counter()
        try:
            yield
        finally:
            with self._lock:
                self.seconds[what] += time.perf_counter() - begin

    def moved(self, read: int, written: int) -> None:
        with self._lock:
            self.read += read
            self.written += written

    def line(self) -> str:
        """What a command prints at its end."""
        workers = max(self.workers, 1)
        speed = (self.read + self.written) / 1e9 / max(self.elapsed, 1e-9)
        each = ", ".join(
            f"{what} {self.seconds[key] / workers:.2f} s"
            for what, key in (
                ("reading", "read"),
                ("fusing", "fuse"),
                ("writing", "write"),
                ("checksums", "check"),
            )
        )
        before = ""
        if self.verified:
            seconds = self.seconds["verify"]
            before = f"compared checksums of {size_text(self.verified)} in {seconds:.2f} s, "
        return before + (
            f"read {size_text(self.read)}, wrote {size_text(self.written)} in {self.elapsed:.2f} s "
            f"({speed:.2f} GB/s; per worker: {each}), then waited {self.waited:.2f} s for the disk"
        )


def size_text(size: float) -> str:
    """Bytes as people read them, in decimal units."""
    for unit, bytes_each in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if size >= bytes_each:
            return f"{size / bytes_each:.2f} {unit}"
    return f"{size:.0f} bytes"
