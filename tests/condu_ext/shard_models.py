"""Models for the tests of sharded tensors: whole ones, the same spread over a mesh, and what a
process must hold of them, by torch's own rules.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

import numpy as np
import torch
from kernel_cases import F32, base_values, differing, model_values, same_bytes
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard, distribute_tensor

import condu_ext as cx

Model = dict[str, Tensor]
Placements = tuple[Placement, ...] | None  # None: plain, a copy on every process

PRIVATE = ("head.*",)
ROWS = 65536  # elements of a row, so that rows end on the borders of chunks
SMALL: dict[str, tuple[tuple[int, ...], Placements]] = {
    "uneven": ((33, 7), (Shard(0),)),
    "one_row": ((1, 40), (Shard(0),)),
    "three_rows": ((3, 5), (Shard(0),)),
    "vector": ((10,), (Shard(0),)),
    "columns": ((6, 11), (Shard(1),)),
    "inner": ((2, 5, 3), (Shard(1),)),
    "replicated": ((5, 4), (Replicate(),)),
    "none": ((0, 4), (Shard(0),)),
    "plain": ((9, 3), None),
    "scalar": ((), None),
}
LARGE: dict[str, tuple[tuple[int, ...], Placements]] = {
    "on_borders": ((4, ROWS), (Shard(0),)),
    "also_on_borders": ((4, ROWS // 2), (Shard(0),)),
    "off_borders": ((3, 40000), (Shard(0),)),
    "wide_columns": ((2, 50001), (Shard(1),)),
    "large_plain": ((70000,), None),
}
ON_BORDERS = {
    "on_borders": ((8, ROWS), (Shard(0),)),
    "in_one_chunk": ((1, ROWS), (Shard(0),)),
    "plain": ((170000,), None),
    "replicated": ((200000,), (Replicate(),)),
}


@dataclass(frozen=True)
class Spread:
    """How the tensors of a model are spread: name → shape and placements, on a mesh."""

    mesh: DeviceMesh
    tensors: Mapping[str, tuple[tuple[int, ...], Placements]]
    made: dict[object, Model] = field(default_factory=dict)  # whole models, which nobody changes

    def base(self, dtype: torch.dtype = F32) -> Model:
        """θ_0, whole; every process makes the same values."""
        if dtype not in self.made:
            self.made[dtype] = self._make_base(dtype)
        return self.made[dtype]

    def tuned(self, task: int, dtype: torch.dtype = F32) -> Model:
        """The fine-tuned model of a task, whole."""
        if (task, dtype) not in self.made:
            self.made[task, dtype] = self._make_tuned(task, dtype)
        return self.made[task, dtype]

    def _make_base(self, dtype: torch.dtype) -> Model:
        generator = torch.Generator().manual_seed(0)
        model = {
            name: base_values(int(np.prod(shape)), dtype, generator).view(shape)
            for name, (shape, _) in self.tensors.items()
        }
        return model | {"steps": torch.tensor([3, 4])} | private_values(0)

    def _make_tuned(self, task: int, dtype: torch.dtype) -> Model:
        generator = torch.Generator().manual_seed(task)
        base = self.base(dtype)
        model = {
            name: model_values(base[name].view(-1), dtype, generator).view(shape)
            for name, (shape, _) in self.tensors.items()
        }
        return model | {"steps": torch.tensor([3, 4])} | private_values(task)

    def shard(self, model: Model) -> Model:
        """A whole model, spread."""
        return {name: self.shard_tensor(name, tensor) for name, tensor in model.items()}

    def shard_tensor(self, name: str, tensor: Tensor) -> Tensor:
        placements = {"head.weight": (Shard(0),) * self.mesh.ndim}.get(name)
        if name in self.tensors:
            placements = self.tensors[name][1]
        if placements is None:
            return tensor.clone()
        return distribute_tensor(tensor.clone(), self.mesh, placements)

    def part(self, name: str, tensor: Tensor) -> Tensor:
        """What this process holds of a whole tensor."""
        return local(self.shard_tensor(name, tensor))


def private_values(task: int) -> Model:
    """A head of as many rows as the task may have classes, and a counter."""
    generator = torch.Generator().manual_seed(100 + task)
    return {
        "head.weight": torch.randn(3 + task, 3, generator=generator),
        "head.count": torch.randint(9, (2,), generator=generator),
    }


def local(tensor: Tensor) -> Tensor:
    """A process's part, without condu_ext's help."""
    return tensor._local_tensor if isinstance(tensor, DTensor) else tensor


def assert_spread(spread: Spread, found: Mapping[str, Tensor], whole: Mapping[str, Tensor]) -> None:
    """Every tensor is sharded as the model is, and holds the bits of its part of the whole."""
    assert sorted(found) == sorted(whole)
    for name, tensor in whole.items():
        like = spread.shard_tensor(name, tensor)
        assert isinstance(found[name], DTensor) == isinstance(like, DTensor), name
        if isinstance(like, DTensor):
            assert found[name].placements == like.placements, name
            assert found[name].device_mesh == spread.mesh, name
            assert found[name].shape == like.shape, name
            assert found[name].stride() == like.stride(), name
        assert same_bytes(local(found[name]), local(like)), (
            f"{name}: {differing(local(found[name]), local(like))}"
        )


def assert_same_state(spread: Spread, state: cx.UnifiedDelta, whole: cx.UnifiedDelta) -> None:
    """u, masks and private tensors equal a single process's bit for bit, rescalers to 4 ulp."""
    assert state.tasks == whole.tasks
    assert_spread(spread, state.delta, whole.delta)
    for task in whole.tasks:
        assert_spread(spread, state.mask(task), whole.mask(task))
        assert_spread(spread, state.private(task), whole.private(task))
        for found, expected in zip(rescalers(state, task), rescalers(whole, task), strict=True):
            assert ulps(found, expected) <= 4, (task, found, expected)


def rescalers(state: cx.UnifiedDelta, task: str) -> Iterator[float]:
    value = state.rescaler(task)
    yield from value.values() if isinstance(value, dict) else [value]


def ulps(a: float, b: float) -> int:
    """Steps of fp32 between two numbers that are not negative."""
    first, second = np.array([a, b], dtype=np.float32).view(np.int32)
    return abs(int(first) - int(second))


def adopt_sums(whole: cx.UnifiedDelta, state: cx.UnifiedDelta) -> None:
    """Give a single process's state the sums and rescalers of a sharded one, so that what follows
    starts from the same state."""
    (target,), (source,) = whole.arenas, state.arenas
    assert target.index == source.index
    for table in ("num", "den", "rescaler"):
        assert getattr(target, table).shape == getattr(source, table).shape
        setattr(target, table, getattr(source, table).clone())
