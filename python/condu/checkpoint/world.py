"""The processes that fuse a checkpoint together: none, those that torchrun started, or those of the
caller's process group.

They exchange Python objects of modest size only (sums, file checksums), so gloo serves as well as
nccl.
"""

from __future__ import annotations

import os
import threading
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist

from condu.checkpoint.options import Report
from condu.checkpoint.watch import OtherGone, Watch
from condu_ext.collective import Step, gather

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

_LATE = 5.0  # seconds of waiting, before the user hears of it
_ASSEMBLY = timedelta(minutes=30)  # for all to be there
_PATIENCE = timedelta(days=7)  # byte-balanced processes still may wait long for the slowest disk


@dataclass
class World:
    """The processes; each is one of ``size`` and has the number ``rank``."""

    rank: int = 0
    size: int = 1
    mesh: DeviceMesh | None = None
    _watch: Watch | None = None

    @classmethod
    def current(cls) -> World:
        """That of the default process group, if there is one."""
        if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
            return cls()
        from torch.distributed.device_mesh import init_device_mesh

        kind = "cuda" if dist.get_backend() == "nccl" else "cpu"
        mesh = init_device_mesh(kind, (dist.get_world_size(),))
        return cls(dist.get_rank(), dist.get_world_size(), mesh)

    @property
    def leads(self) -> bool:
        """Whether this is the process that locks, commits and talks."""
        return self.rank == 0

    def step(self) -> Step:
        """A block that all processes enter; see :class:`condu_ext.collective.Step`. While they are
        watched, its end raises OtherGone if one of them does not come."""
        return Step(self.mesh, gather if self._watch is None else self._meet)

    def _meet(self, mesh: DeviceMesh, item: object) -> list[Any]:
        """:func:`condu_ext.collective.gather`, begun when all are there to take part at once."""
        assert self._watch is not None
        self._watch.meet()
        try:
            return gather(mesh, item)
        except RuntimeError as error:  # the backend's, in terms of sockets
            raise OtherGone("another process is gone") from error

    def gather(self, item: Any) -> list[Any]:
        """``item`` of every process."""
        with self.step() as step:
            step.mine = item
        return step.all

    def __enter__(self) -> World:
        """A block that all processes enter, in which they watch each other."""
        if self.mesh is not None:
            run = self.gather(f"condu/{uuid.uuid4().hex}")[0]
            self._watch = Watch(_store(), run, self.rank, self.size)
            self._watch.start()
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        watch, self._watch = self._watch, None
        if watch is not None:
            if isinstance(error, OtherGone) or not isinstance(error, Exception | None):
                watch.tell("gone")
            watch.stop()

    def fail(self) -> None:
        """Tell the others to stop, and to take the next step: called before it by a process where
        something went wrong."""
        if self._watch is not None:
            self._watch.tell("failed")

    def check_others(self) -> None:
        """Raises OtherFailed or OtherGone if another process failed, or is not there any more."""
        if self._watch is not None:
            self._watch.check()


def _store() -> dist.Store:
    """The store through which the processes of the default group found each other."""
    # torch has no public name for that of a group which the caller started
    return dist.distributed_c10d._get_default_store()


@contextmanager
def launched(report: Report) -> Iterator[None]:
    """Join the processes that torchrun started, if it did, for the time of the block.

    ``report`` gets a line if they are long in coming: perhaps nobody started any, and only the
    variables of an earlier torchrun are set.
    """
    count = os.environ.get("WORLD_SIZE", "1")
    if not count.isdecimal():
        raise ValueError(f"the environment variable WORLD_SIZE must be a number, not {count!r}")
    if int(count) == 1 or dist.is_initialized():
        yield
        return
    where = ":".join(os.environ.get(name, "?") for name in ("MASTER_ADDR", "MASTER_PORT"))
    line = f"waiting at {where} for the {count} processes that WORLD_SIZE speaks of"
    late = threading.Timer(_LATE, report, [line])
    late.daemon = True
    late.start()
    try:
        store, rank, size = next(dist.rendezvous("env://", timeout=_ASSEMBLY))
    finally:
        late.cancel()
    store.set_timeout(_ASSEMBLY)
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=_PATIENCE)
    try:
        yield
    finally:
        dist.destroy_process_group()
