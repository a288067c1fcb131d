"""Test images, read and decoded once as long as they fit into memory."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, TensorDataset

if TYPE_CHECKING:
    from collections.abc import Callable

    from condu.tasks.benchmark import Task


class DecodedTests:
    """Test sets of tasks through a transform, (image tensor, label).

    They stay in host memory as long as all of them together fit into ``cache_bytes``; those beyond
    that are read anew on each pass over them. ``num_workers`` processes decode.
    """

    def __init__(
        self, transform: Callable[[Any], Tensor], *, cache_bytes: int, num_workers: int
    ) -> None:
        self._transform = transform
        self._cache_bytes = cache_bytes
        self._num_workers = num_workers
        self._sets: dict[str, Dataset[Any]] = {}

    def __getitem__(self, task: Task) -> Dataset[Any]:
        """A task's test set; ValueError if it is empty."""
        if task.name not in self._sets:
            test = not_empty(task.dataset("test", self._transform), task, "test")
            image, _ = test[0]
            held = [
                t.tensors[0].nbytes for t in self._sets.values() if isinstance(t, TensorDataset)
            ]
            if sum(held) + image.nbytes * len(test) <= self._cache_bytes:
                test = _decoded(test, self._num_workers)
            self._sets[task.name] = test
        return self._sets[task.name]


def not_empty(dataset: Any, task: Task, split: str) -> Any:
    """The data set itself; ValueError, naming task and split, if nothing is in it."""
    if len(dataset) == 0:
        raise ValueError(f"task {task.name!r}: the {split} set is empty")
    return dataset


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
