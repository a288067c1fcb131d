"""The processes that run the cases of sharded models, and how they spread models."""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property
from pathlib import Path

import torch.distributed as dist
from shard_models import LARGE, ON_BORDERS, SMALL, Spread
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, Shard


class Group:
    """The processes that run a case, and a folder that all of them see."""

    def __init__(self, rank: int, world: int, folder: Path) -> None:
        self.rank, self.world, self.folder = rank, world, folder
        self.mesh = init_device_mesh("cpu", (world,))

    @property
    def last(self) -> bool:
        """Whether this is the process on which a case makes its mistake."""
        return self.rank == self.world - 1

    @cached_property
    def small(self) -> Spread:
        return Spread(self.mesh, SMALL)

    @cached_property
    def large(self) -> Spread:
        return Spread(self.mesh, LARGE)

    @cached_property
    def on_borders(self) -> Spread:
        return Spread(self.mesh, ON_BORDERS)

    @cached_property
    def hybrid(self) -> Spread:
        """Two replicas, each sharded over half of the processes."""
        mesh = init_device_mesh("cpu", (2, self.world // 2))
        return Spread(
            mesh,
            {n: (shape, p and (Replicate(), *p)) for n, (shape, p) in (SMALL | ON_BORDERS).items()},
        )

    @cached_property
    def grid(self) -> Spread:
        """Sharded over both dimensions of a mesh."""
        mesh = init_device_mesh("cpu", (2, self.world // 2))
        rows, columns = Shard(0), Shard(1)
        return Spread(
            mesh,
            {
                "rows_and_columns": ((7, 9), (rows, columns)),
                "columns_and_rows": ((7, 9), (columns, rows)),
                "twice": ((7, 2), (rows, rows)),
                "some_twice": ((70, 3000), (rows, rows)),
                "replicated_rows": ((5, 3), (rows, Replicate())),
                "plain": ((4,), None),
            },
        )

    def everywhere(self, value: object) -> list[object]:
        """The value of every process."""
        values: list[object] = [None] * self.world
        dist.all_gather_object(values, value)
        return values

    def shared(self, name: str) -> Path:
        """A new folder for this case, for all processes."""
        dist.barrier()
        return self.folder / name


Case = Callable[[Group], None]
