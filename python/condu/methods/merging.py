"""One model into which every task is merged: fine-tune from it, then join the two."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import replace
from typing import NamedTuple

from torch import Tensor

from condu.methods.sequential import Sequential
from condu.record import Learned
from condu.tuning import Trained


class Merged(NamedTuple):
    """Weights by name, the seconds that joining them took, and facts to keep beside them."""

    weights: Mapping[str, Tensor]
    seconds: float
    facts: Mapping[str, str]


class Merging(Sequential):
    """As `sequential`, but what each task leaves is merged into what there was. What is kept is the
    merged model, and the fine-tuned one until the next task has overwritten it."""

    @abstractmethod
    def train(self, index: int, start: Trained | None) -> Trained:
        """Fine-tune on task `index` from `start`, or from θ_0 if that is None."""

    @abstractmethod
    def merge(self, start: Trained | None, trained: Trained) -> Merged:
        """Join the weights before a task, θ_0 if `start` is None, with those after it."""

    def learn(self, index: int) -> Learned:
        self.workspace.accelerator.wait_for_everyone()  # the main process may still be writing
        task = self.workspace.benchmark.tasks[index]
        if self._file.exists() and (merged := Trained.open(self._file)).task == task.name:
            return self.learned(merged, fuse=0.0)  # a kill came after this very step
        start = self._latest(index - 1) if index else None
        trained = self.train(index, start)
        if not self.workspace.accelerator.is_main_process:
            return Learned.by(trained)
        result = self.merge(start, trained)
        replace(trained, path=self._file).save(result.weights, **result.facts)
        return self.learned(Trained.open(self._file), result.seconds)

    def learned(self, merged: Trained, fuse: float) -> Learned:
        """What is reported of a task whose merged model is in a file."""
        return Learned.by(merged, fuse=fuse)
