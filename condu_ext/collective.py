"""Steps that all processes of a device mesh take together, so that none goes on alone.

What one process finds wrong, all must hear before any of them changes something or waits for the
others: every step ends with one exchange of what each process has to say. Which processes take part
follows from the arguments, from the mesh of their first sharded tensor; so where on one process all
are plain, that one takes part in nothing, and the others wait until their backend gives up.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from types import TracebackType
from typing import TYPE_CHECKING, Any, TypeAlias

import torch.distributed as dist
import xxhash

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch.distributed.device_mesh import DeviceMesh
    from typing_extensions import Self


Exchange: TypeAlias = "Callable[[DeviceMesh, object], list[Any]]"


@dataclass(frozen=True)
class _Failure:
    """What other processes learn of an error.

    Attributes:
        kind: its class, or the nearest one above it that they can look up.
        text: the message.
        system: errno, its meaning and the file name, of an OSError that has them.
    """

    kind: type[Exception]
    text: str
    system: tuple[int, str, Any] | None

    @classmethod
    def of(cls, error: Exception) -> _Failure:
        system = None
        if isinstance(error, OSError) and error.errno is not None:
            system = error.errno, str(error.strerror), error.filename
        return cls(_kind(error), _text(error), system)

    def on(self, rank: int) -> Exception:
        """The error that the others raise."""
        if self.system is not None:
            number, meaning, file = self.system
            return OSError(number, f"rank {rank}: {meaning}", file)
        message = f"rank {rank}: {self.text}"
        try:
            return self.kind(message)
        except TypeError:  # an error that is made of more than a message
            return RuntimeError(f"rank {rank}: {self.kind.__name__}: {self.text}")


class Step:
    """A block that every process of ``mesh`` enters; without a mesh, a block like any other::

        with Step(mesh) as step:
            step.mine = …  # what the others shall get; picklable
            step.claims["the rule"] = …  # what must be equal on all of them, compared by repr
        step.all  # everybody's, in the order of the mesh

    Leaving the block raises on every process what was raised in it on any, the first in the order
    of the mesh: the error itself where it happened, elsewhere one of its kind that names the rank.
    Interrupts such as KeyboardInterrupt do not wait for the others.

    Raises:
        RuntimeError: this process is not part of the mesh.
        ValueError: claims differ; the message names the claim, two ranks and both values.
    """

    def __init__(self, mesh: DeviceMesh | None, exchange: Exchange | None = None) -> None:
        """``exchange``: how to get everybody's items, where :func:`gather` alone does not do."""
        self._mesh = mesh
        self._exchange = exchange or gather
        self.mine: Any = None
        self.all: list[Any] = []
        self.claims: dict[str, object] = {}

    def __enter__(self) -> Self:
        if self._mesh is not None and self._mesh.get_coordinate() is None:
            raise RuntimeError(f"rank {dist.get_rank()} is not part of {self._mesh}")
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._mesh is None:
            self.all = [self.mine]
        elif error is None or isinstance(error, Exception):
            self._finish(self._mesh, error)

    def _finish(self, mesh: DeviceMesh, error: Exception | None) -> None:
        claims = {name: repr(value) for name, value in self.claims.items()}
        digest = xxhash.xxh3_64_hexdigest(repr(claims).encode())
        failure = _Failure.of(error) if error else None
        outcomes = self._exchange(mesh, (failure, digest, None if error else self.mine))
        ranks = ranks_of(mesh)
        for rank, (failed, _, _) in zip(ranks, outcomes, strict=True):
            if failed == failure and error is not None:
                return  # this process's own error goes on its way
            if failed:  # the first one's for all, so that whoever handles errors stays in step
                raise failed.on(rank) from error
        if any(other != digest for _, other, _ in outcomes):
            _refuse_differing(ranks, self._exchange(mesh, claims))
        self.all = [mine for _, _, mine in outcomes]


def ranks_of(mesh: DeviceMesh) -> list[int]:
    """The ranks of a mesh in the order in which its processes count here (row-major)."""
    ranks: list[int] = mesh.mesh.flatten().tolist()
    return ranks


def gather(mesh: DeviceMesh, item: object) -> list[Any]:
    """``item`` of every process in the order of :func:`ranks_of`: along one dimension after the
    other, for each of them has a group."""
    items = [item]
    for dim in reversed(range(mesh.ndim)):
        parts: list[Any] = [None] * mesh.size(dim)
        dist.all_gather_object(parts, items, group=mesh.get_group(dim))
        items = [one for part in parts for one in part]
    return items


def _kind(error: Exception) -> type[Exception]:
    """The error's class, or the nearest one above it that other processes can look up."""
    return next(
        kind
        for kind in type(error).__mro__
        if getattr(sys.modules.get(kind.__module__), kind.__qualname__, None) is kind
    )


def _text(error: BaseException) -> str:
    """The message; of a KeyError without the quotes that str() adds."""
    return str(error.args[0]) if isinstance(error, KeyError) and error.args else str(error)


def _refuse_differing(ranks: list[int], claims: list[dict[str, str]]) -> None:
    for rank, other in zip(ranks, claims, strict=True):
        for name in claims[0] | other:
            ours, theirs = claims[0].get(name, "none"), other.get(name, "none")
            if ours != theirs:
                raise ValueError(
                    f"the processes differ in {name}: {ours} on rank {ranks[0]}, "
                    f"{theirs} on rank {rank}"
                )
