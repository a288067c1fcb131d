"""A job that reads and writes next to nothing, of any size: what is left is the bookkeeping."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from condu.checkpoint.job import Outcome
from condu.checkpoint.room import Room
from condu.checkpoint.target import NewFile
from condu.checkpoint.units import Unit
from condu_ext.layout import chunk_count
from condu_ext.storage import shards_of

LLAMA_70B = [
    *(128256 * 8192, 128256 * 8192, 8192),
    *([8192 * 8192] * 2 + [8192 * 1024] * 2 + [8192 * 28672] * 3 + [8192] * 2) * 80,
]
"""Elements of its tensors."""


class IdleJob:
    """A ``condu.checkpoint.job.Job`` like that of unifying ``tasks`` fine-tuned models."""

    reads, element_bytes, has_base = 0, 40.0, False

    def __init__(self, numels: Sequence[int], tasks: int) -> None:
        self.numels, self._tasks = list(numels), tasks
        self.shards = shards_of(self.numels, torch.float32)
        self.chunk_rows = 2 * tasks

    def files(self, shard: int, generation: int) -> list[NewFile]:
        return [NewFile(f"{generation}-{shard}-{t}", b"header", 6) for t in range(self._tasks + 1)]

    def read(self, unit: Unit, room: Room) -> None:
        return None

    def fuse(self, unit: Unit, inputs: Any, room: Room, generation: int) -> Outcome:
        sums = torch.ones(self.chunk_rows, chunk_count(unit.numels), dtype=torch.float64)
        return Outcome([], sums=sums, zero_sums=[1] * len(unit.segments))

    def check_base(self, tensor: int, digits: str) -> None:
        return None

    def base_fingerprint(self, tensor: int) -> str:
        return ""
