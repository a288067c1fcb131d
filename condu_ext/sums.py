"""From the kernels' chunk sums to sums over whole tensors, over all processes that hold a part.

Every process sums what it holds in chunks of its own, and says where in the tensor each begins. The
sums of the elements that it counts (:attr:`ShardSpec.owned`) are gathered, not totals of them, and
added in the order of those places, by one loop, as in a single process. So where parts are ranges
of a row-major tensor that begin on a chunk's border, a rescaler does not depend on the number of
processes, bit for bit; elsewhere the same terms are added in other groups, to the same precision.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from condu_ext import _native
from condu_ext.collective import Step
from condu_ext.layout import CHUNK, ModelSpec, TensorSpec
from condu_ext.sharding import leads


@dataclass(frozen=True)
class _Counted:
    """Chunk sums that a process contributes.

    Attributes:
        tensor: int64 [chunks], which tensor of the call.
        place: int64 [chunks], the number of the chunk's first element in the whole tensor.
        sums: float64 [rows, chunks].
    """

    tensor: NDArray[np.int64]
    place: NDArray[np.int64]
    sums: NDArray[np.float64]


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


def _counted(spec: ModelSpec, index: Sequence[int], chunk_sums: Tensor) -> _Counted:
    """The part of an arena's chunk sums [rows, chunks] that this process counts."""
    entries = [spec.tensors[k] for k in index]
    places = [chunk_places(entry) for entry in entries]
    replicated = leads(spec.mesh)
    owned = [
        np.full(len(place), entry.shard.owned if entry.shard else replicated)
        for entry, place in zip(entries, places, strict=True)
    ]
    tensor = np.repeat(np.arange(len(entries)), [len(place) for place in places])
    chosen = np.concatenate(owned)
    return _Counted(
        tensor[chosen], np.concatenate(places)[chosen], chunk_sums.cpu().numpy()[:, chosen]
    )


def _added(tensors: int, parts: Sequence[_Counted]) -> Tensor:
    """float64 [rows, tensors]: what all processes counted, added in order of place."""
    tensor, place = (
        np.concatenate([getattr(part, field) for part in parts]) for field in ("tensor", "place")
    )
    sums = np.concatenate([part.sums for part in parts], axis=1)
    order = np.lexsort((place, tensor))
    chunks = np.bincount(tensor, minlength=tensors)
    return _native.add_chunks((chunks * CHUNK).tolist(), torch.from_numpy(sums[:, order]))


class SumStep(Step):
    """A step in which every process computes, and after which all know the sums.

    with SumStep(spec) as step:
        step.add(arena.index, kernel(…))  # for each arena
    step.sums()                           # for each, float64 [rows, tensors]
    """

    def __init__(self, spec: ModelSpec) -> None:
        super().__init__(spec.mesh)
        self.mine = []
        self._spec = spec
        self._tensors: list[int] = []

    def add(self, index: Sequence[int], chunk_sums: Tensor) -> None:
        """Take the chunk sums [rows, chunks] of the tensors at ``index`` of the spec."""
        self._tensors.append(len(index))
        if self._spec.mesh is None:
            numels = [self._spec.tensors[k].numel for k in index]
            self.mine.append(_native.add_chunks(numels, chunk_sums))
        else:
            self.mine.append(_counted(self._spec, index, chunk_sums))

    def sums(self) -> list[Tensor]:
        """Per call of :meth:`add` the sums over whole tensors, float64 [rows, tensors]."""
        if self._spec.mesh is None:
            return list(self.mine)
        parts = zip(*self.all, strict=True)
        return [_added(n, part) for n, part in zip(self._tensors, parts, strict=True)]
