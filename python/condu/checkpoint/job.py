"""What a streamed fusion consists of, and what it took: the terms between runner and jobs."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Protocol

from torch import Tensor

from condu.checkpoint.room import Room
from condu.checkpoint.target import NewFile
from condu.checkpoint.units import Unit


@dataclass
class Outcome:
    """A unit's results, in the worker's memory.

    Attributes:
        written: name of a file, place in it, bytes: in file order within each file.
        base: per segment the base model's bytes; empty where there is no base.
        sums: chunk sums, float64 [rows, chunks]; None for jobs that have none.
        zero_sums: per segment, how many elements the rule for total = 0 decided.
    """

    written: list[tuple[str, int, memoryview]]
    base: list[memoryview] = field(default_factory=list)
    sums: Tensor | None = None
    zero_sums: Sequence[int] = ()


class Job(Protocol):
    """Ranges in, files out. Tensors are counted by position in ``numels``.

    Attributes:
        numels: elements of each tensor.
        shards: the tensors of each group of files, in file order.
        reads: bytes to read for the whole job.
        element_bytes: memory that a unit takes for each of its elements.
        chunk_rows: rows of chunk sums; 0 for none.
        has_base: whether a base model is read, whose fingerprints are made on the way.
    """

    @property
    def numels(self) -> Sequence[int]: ...
    @property
    def shards(self) -> Sequence[Sequence[int]]: ...
    @property
    def reads(self) -> int: ...
    @property
    def element_bytes(self) -> float: ...
    @property
    def chunk_rows(self) -> int: ...
    @property
    def has_base(self) -> bool: ...
    def files(self, shard: int, generation: int) -> list[NewFile]:
        """The files of a shard, whose names may carry a generation."""

    def read(self, unit: Unit, room: Room) -> Any:
        """A unit's inputs."""

    def fuse(self, unit: Unit, inputs: Any, room: Room, generation: int) -> Outcome:
        """What becomes of them.

        Raises:
            ValueError: NaN or infinite values, naming task and tensor.
        """

    def check_base(self, tensor: int, digits: str) -> None:
        """Raises ValueError if a tensor's fingerprint is not that of the state's base model."""

    def base_fingerprint(self, tensor: int) -> str:
        """The fingerprint of the base model's tensor, read anew."""


class Costs:
    """Bytes and seconds of a run; the seconds of all workers, added."""

    def __init__(self) -> None:
        self.read = self.written = self.verified = 0
        self.seconds = dict.fromkeys(("verify", "read", "fuse", "write", "check", "sync"), 0.0)
        self.elapsed = self.waited = 0.0
        self.workers = 1
        self._lock = threading.Lock()

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
