"""Random models of given shapes, and states of any number of tasks made from them.

A model is the base plus noise of about 1e-3, as fine-tuning leaves it. Noise comes from one pool of
normal values, read from another place for every tensor and task: drawing each value anew would take
longer than everything that is measured.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

import condu_ext as cx
from condu.bench.cases import Precision
from condu.bench.shapes import Shapes

Weights = dict[str, Tensor]
POOL = (1 << 24) + 43  # a prime: no period of a power of two


class Inputs:
    """Models and states for the operations on one architecture in one precision.

    Only what was asked for last is kept: the base, one fine-tuned model, and either the models of
    a unify, one state, or two states to merge.
    """

    def __init__(self, shapes: Shapes, precision: Precision, device: torch.device) -> None:
        self.shapes, self.precision, self.device = shapes, precision, device
        generator = torch.Generator(device).manual_seed(42)
        self._pool = torch.randn(POOL, generator=generator, device=device)
        self.pretrained = self.empty_model()
        for position, target in enumerate(self.pretrained.values()):
            for part, noise in self._noise(target, -1, position):
                part.copy_(noise).mul_(0.02)
        self._spare: Weights | None = None
        self._models: list[Weights] = []
        self._states: dict[int, cx.UnifiedDelta] = {}  # by the number of their first task

    def empty_model(self) -> Weights:
        """A model whose values are not set."""
        dtype = self.precision.models
        return {
            name: torch.empty(shape, dtype=dtype, device=self.device)
            for name, shape in self.shapes.items()
        }

    def newcomer(self, task: int) -> Weights:
        """Fine-tuned weights of a task, in the one buffer that all of them share."""
        self._models = []
        if self._spare is None:
            self._spare = self.empty_model()
        self._finetune(self._spare, task)
        return self._spare

    def models(self, tasks: int) -> dict[str, Weights]:
        """Fine-tuned weights of the tasks 0 to ``tasks`` - 1, each in memory of its own."""
        self._spare, self._states = None, {}
        while len(self._models) < tasks:
            self._models.append(self.empty_model())
            self._finetune(self._models[-1], len(self._models) - 1)
        return {task_name(t): model for t, model in enumerate(self._models[:tasks])}

    def state(self, tasks: int, first: int = 0) -> cx.UnifiedDelta:
        """A state of ``tasks`` tasks from number ``first`` on, grown from the last one asked for.

        It overwrites the weights that :meth:`newcomer` returned.
        """
        kept = self._states.get(first)
        if kept is None or len(kept.tasks) > tasks:
            kept = cx.UnifiedDelta.empty(self.pretrained, dtype=self.precision.state)
        self._states = self._states | {first: kept} if first else {0: kept}
        while len(kept.tasks) < tasks:
            task = first + len(kept.tasks)
            cx.absorb_(kept, task_name(task), self.newcomer(task), self.pretrained, check=False)
        return kept

    def halves(self, tasks: int) -> tuple[cx.UnifiedDelta, cx.UnifiedDelta]:
        """Two states that hold ``tasks`` tasks together, the first not fewer than the second."""
        first = (tasks + 1) // 2
        return self.state(first), self.state(tasks - first, first)

    def _finetune(self, target: Weights, task: int) -> None:
        for position, (name, tensor) in enumerate(target.items()):
            base = self.pretrained[name].view(-1)
            start = 0
            for part, noise in self._noise(tensor, task, position):
                torch.add(base[start : start + len(part)], noise, alpha=1e-3, out=part)
                start += len(part)

    def _noise(self, tensor: Tensor, task: int, position: int) -> list[tuple[Tensor, Tensor]]:
        """Flat parts of a tensor, each with as many values of the pool."""
        place = (7_368_787 * (task + 2) + 1_299_709 * position) % POOL
        parts, flat, start = [], tensor.view(-1), 0
        while start < math.prod(tensor.shape):
            count = min(len(flat) - start, POOL - place)
            parts.append((flat[start : start + count], self._pool[place : place + count]))
            start, place = start + count, (place + count) % POOL
        return parts


def task_name(number: int) -> str:
    """The name under which task ``number`` is fused."""
    return f"task {number}"
