"""From the kernels' chunk sums to sums over whole tensors, over all processes that hold a part.

Every process sums what it holds in chunks of its own, and says where in the tensor each begins. The
sums of the elements that it counts (:attr:`ShardSpec.owned`) are gathered, not totals of them, and
added in the order of those places, by one loop, as in a single process. So where parts are ranges
of a row-major tensor that begin on a chunk's border, a rescaler does not depend on the number of
processes, bit for bit; elsewhere the same terms are added in other groups, to the same precision.

Copies of the same elements are not counted again, but they must be equal: plain tensors of a module
of FSDP2, whose gradients nobody averages, drift apart unnoticed otherwise. Their totals tell most:
copies with equal totals of different elements, as when two of them are swapped, go unnoticed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from condu_ext import _native
from condu_ext.collective import Step, ranks_of
from condu_ext.layout import CHUNK, ModelSpec, TensorSpec
from condu_ext.sharding import leads

_SAME = 1e-12  # totals of equal elements may differ by the order in which PyTorch adds them


@dataclass(frozen=True)
class _Contribution:
    """What a process has to say of the sums of an arena.

    Attributes:
        tensor: int64 [chunks], which tensor of the arena.
        place: int64 [chunks], the number of the chunk's first element in the whole tensor.
        sums: float64 [rows, chunks].
        totals: (tensor, place) of each part that it holds → float64 [rows], the part's sums.
    """

    tensor: NDArray[np.int64]
    place: NDArray[np.int64]
    sums: NDArray[np.float64]
    totals: dict[tuple[int, int], NDArray[np.float64]]


def chunk_places(entry: TensorSpec) -> NDArray[np.int64]:
    """For each chunk of the local part the number of its first element in the whole tensor."""
    rest = np.arange(0, entry.local_numel, CHUNK, dtype=np.int64)
    if entry.shard is None:
        return rest
    place, stride = np.zeros_like(rest), 1
    for dim in reversed(range(len(entry.shape))):
        rest, index = np.divmod(rest, max(entry.shard.shape[dim], 1))
        place += (index + entry.shard.offset[dim]) * stride
        stride *= entry.shape[dim]
    return place


def _contribution(spec: ModelSpec, index: Sequence[int], chunk_sums: Tensor) -> _Contribution:
    """This process's part in the sums of an arena whose chunk sums are [rows, chunks]."""
    entries = [spec.tensors[k] for k in index]
    places = [chunk_places(entry) for entry in entries]
    counts = [len(place) for place in places]
    sums = chunk_sums.cpu().numpy()
    tensor, place = np.repeat(np.arange(len(entries)), counts), np.concatenate(places)
    replicated = leads(spec.mesh)
    owned = [entry.shard.owned if entry.shard else replicated for entry in entries]
    # NaN and infinity count wherever they are, for all must see them
    chosen = np.repeat(owned, counts) | ~np.isfinite(sums).all(0)
    parts = np.split(sums, np.cumsum(counts)[:-1], axis=1)
    totals = {
        (k, int(place[0])): part.sum(1)
        for k, (place, part) in enumerate(zip(places, parts, strict=True))
        if len(place)
    }
    return _Contribution(tensor[chosen], place[chosen], sums[:, chosen], totals)


def _check_copies(
    names: Sequence[str],
    tasks: Sequence[str],
    parts: Sequence[_Contribution],
    ranks: Sequence[int],
) -> None:
    """Processes that hold the same elements found the same (finite) values.

    Raises:
        ValueError: naming the task of the first row that differs, the tensor and two ranks.
    """
    first: dict[tuple[int, int], tuple[int, NDArray[np.float64]]] = {}
    for rank, part in zip(ranks, parts, strict=True):
        for key, totals in part.totals.items():
            other, expected = first.setdefault(key, (rank, totals))
            differing = abs(totals - expected) > _SAME * expected
            if other != rank and differing.any():
                task = tasks[int(differing.argmax())]
                raise ValueError(
                    f"task {task!r}, tensor {names[key[0]]!r}: ranks {other} and {rank} have "
                    "copies of the same elements, and they differ"
                )


def _added(tensors: int, parts: Sequence[_Contribution]) -> Tensor:
    """float64 [rows, tensors]: what all processes counted, added in order of place."""
    tensor, place = (
        np.concatenate([getattr(part, field) for part in parts]) for field in ("tensor", "place")
    )
    sums = np.concatenate([part.sums for part in parts], axis=1)
    order = np.lexsort((place, tensor))
    chunks = np.bincount(tensor, minlength=tensors)
    return _native.add_chunks((chunks * CHUNK).tolist(), torch.from_numpy(sums[:, order]))


class SumStep(Step):
    """A step in which every process computes, and after which all know the sums::

    with SumStep(spec, tasks) as step:
        step.add(arena.index, kernel(…))  # for each arena
    step.sums()  # for each, float64 [rows, tensors]

    ``tasks`` says for each row which task brought what may be wrong with it.
    """

    def __init__(self, spec: ModelSpec, tasks: Sequence[str]) -> None:
        super().__init__(spec.mesh)
        self.mine = []
        self._spec = spec
        self._tasks = tasks
        self._indices: list[Sequence[int]] = []

    def add(self, index: Sequence[int], chunk_sums: Tensor) -> None:
        """Take the chunk sums [rows, chunks] of the tensors at ``index`` of the spec."""
        self._indices.append(index)
        if self._spec.mesh is None:
            numels = [self._spec.tensors[k].numel for k in index]
            self.mine.append(_native.add_chunks(numels, chunk_sums))
        else:
            self.mine.append(_contribution(self._spec, index, chunk_sums))

    def sums(self) -> list[Tensor]:
        """Per call of :meth:`add` the sums over whole tensors, float64 [rows, tensors].

        Raises:
            ValueError: copies of the same elements differ between processes. NaN and infinity are
                no error here, but are in the sums.
        """
        if self._spec.mesh is None:
            return list(self.mine)
        result = []
        for index, parts in zip(self._indices, zip(*self.all, strict=True), strict=True):
            added = _added(len(index), parts)
            if added.isfinite().all():
                names = [self._spec.tensors[k].name for k in index]
                _check_copies(names, self._tasks, parts, ranks_of(self._spec.mesh))
            result.append(added)
        return result
