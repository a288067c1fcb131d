"""Test images, read and decoded once as long as they fit into memory.

What ends a usual image transform, scaling 8-bit pixels to [0, 1] and normalising, is left to the
model's device, a batch at a time: pixels take a quarter of the memory, kept or on their way. The
same operations give the same bits there as in the transform.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, TensorDataset
from torchvision.transforms import Compose, Normalize, PILToTensor, ToTensor

from condu.bench.memory import available_memory

if TYPE_CHECKING:
    from condu.tasks.benchmark import Task

Transform = Callable[[Any], Tensor]


class Unfinished(Dataset[tuple[Tensor, int]]):
    """(image tensor, label) of ``source``, whose images become inputs of a model by ``finish``:
    [B, …] to [B, …], on whatever device they are."""

    def __init__(self, source: Dataset[Any], finish: Callable[[Tensor], Tensor]) -> None:
        self.source = source
        self.finish = finish

    def __len__(self) -> int:
        return len(self.source)  # type: ignore[arg-type]

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        image, label = self.source[index]
        return image, label


class DecodedTests:
    """Test sets of tasks through a transform, as far as their decoding goes.

    They stay in host memory as long as all of them together fit into ``cache_bytes`` (None: a
    quarter of what is available when this is made); those beyond that are read anew on each pass
    over them. ``num_workers`` processes decode.
    """

    def __init__(self, transform: Transform, *, cache_bytes: int | None, num_workers: int) -> None:
        self._decode, self._finish = _divided(transform)
        self._cache_bytes = (
            available_memory(torch.device("cpu")) // 4 if cache_bytes is None else cache_bytes
        )
        self._num_workers = num_workers
        self._sets: dict[str, Unfinished] = {}

    def __getitem__(self, task: Task) -> Unfinished:
        """A task's test set; ValueError if it is empty."""
        if task.name not in self._sets:
            test = not_empty(task.dataset("test", self._decode), task, "test")
            image, _ = test[0]
            sources = [t.source for t in self._sets.values()]
            held = [s.tensors[0].nbytes for s in sources if isinstance(s, TensorDataset)]
            if sum(held) + image.nbytes * len(test) <= self._cache_bytes:
                test = _decoded(test, self._num_workers)
            self._sets[task.name] = Unfinished(test, self._finish)
        return self._sets[task.name]


def not_empty(dataset: Any, task: Task, split: str) -> Any:
    """The data set itself; ValueError, naming task and split, if nothing is in it."""
    if len(dataset) == 0:
        raise ValueError(f"task {task.name!r}: the {split} set is empty")
    return dataset


def _divided(transform: Transform) -> tuple[Transform, Callable[[Tensor], Tensor]]:
    """The part of a transform up to 8-bit pixels, and what is left to do with a batch of them: all
    and nothing, unless it ends as those of CLIP models do."""
    steps = transform.transforms if isinstance(transform, Compose) else []
    match steps:
        case [*decoding, ToTensor(), Normalize() as normalize]:
            return Compose([*decoding, PILToTensor()]), lambda pixels: normalize(_scaled(pixels))
    return transform, lambda images: images


def _scaled(pixels: Tensor) -> Tensor:
    # by a tensor: CUDA divides by a number with its reciprocal, which rounds otherwise
    return pixels.float() / torch.tensor(255.0, device=pixels.device)


def _decoded(dataset: Any, num_workers: int) -> TensorDataset:
    """All images and labels as two tensors, read once."""
    images: Tensor | None = None
    labels = torch.empty(len(dataset), dtype=torch.int64)
    done = 0
    for batch, batch_labels in DataLoader(dataset, batch_size=256, num_workers=num_workers):
        if images is None:
            images = batch.new_empty(len(dataset), *batch.shape[1:])
        images[done : done + len(batch)] = batch
        labels[done : done + len(batch)] = batch_labels
        done += len(batch)
    assert images is not None
    return TensorDataset(images, labels)
