"""What a streamed fusion consists of: the terms between runner and jobs."""

from __future__ import annotations

from collections.abc import Sequence
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
