"""The processes that fuse a checkpoint together: none, those that torchrun started, or those of the
caller's process group.

They exchange Python objects of modest size only (sums, file checksums), so gloo serves as well as
nccl. A process that fails says so in the store through which the processes found each other, so
that the others stop within seconds and not when they are done.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist

from condu_ext.collective import Step

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

_FAILED = "condu/failed"
_PATIENCE = timedelta(days=7)  # byte-balanced processes still may wait long for the slowest disk
_LOOK = 1.0  # seconds between two looks at what the others say


@dataclass
class World:
    """The processes; each is one of ``size`` and has the number ``rank``."""

    rank: int = 0
    size: int = 1
    mesh: DeviceMesh | None = None
    store: Any = None
    _looked: float = 0.0

    @classmethod
    def current(cls) -> World:
        """That of the default process group, if there is one."""
        if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
            return cls()
        from torch.distributed.device_mesh import init_device_mesh

        kind = "cuda" if dist.get_backend() == "nccl" else "cpu"
        mesh = init_device_mesh(kind, (dist.get_world_size(),))
        return cls(dist.get_rank(), dist.get_world_size(), mesh, _started_with)

    @property
    def leads(self) -> bool:
        """Whether this is the process that locks, commits and talks."""
        return self.rank == 0

    def step(self) -> Step:
        """A block that all processes enter; see :class:`condu_ext.collective.Step`."""
        return Step(self.mesh)

    def gather(self, item: Any) -> list[Any]:
        """``item`` of every process."""
        with self.step() as step:
            step.mine = item
        return step.all

    def fail(self) -> None:
        """Tell the others to stop; called where something went wrong."""
        if self.store is not None:
            self.store.set(_FAILED, str(self.rank))

    def check_others(self) -> None:
        """Raises RuntimeError if another process failed; looks once a second."""
        if self.store is None or time.monotonic() - self._looked < _LOOK:
            return
        self._looked = time.monotonic()
        if self.store.check([_FAILED]):
            raise OtherFailed(f"rank {self.store.get(_FAILED).decode()} failed")


class OtherFailed(RuntimeError):
    """Another process failed; it says itself what was wrong."""


_started_with: Any = None


@contextmanager
def launched() -> Iterator[None]:
    """Join the processes that torchrun started, if it did, for the time of the block."""
    global _started_with
    if int(os.environ.get("WORLD_SIZE", "1")) == 1 or dist.is_initialized():
        yield
        return
    store, rank, size = next(dist.rendezvous("env://", timeout=timedelta(minutes=30)))
    store.set_timeout(timedelta(minutes=30))
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=_PATIENCE)
    _started_with = store
    try:
        yield
    finally:
        _started_with = None
        dist.destroy_process_group()
