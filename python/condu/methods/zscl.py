"""ZSCL: distil from the pretrained model on reference data, stay near, average the weights.

Preventing Zero-Shot Transfer Degradation in Continual Learning of Vision-Language Models,
arXiv 2303.06628.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

import condu_ext as cx
from condu.config import ConfigError
from condu.distillation import Distillation
from condu.live import write
from condu.methods.base import register
from condu.methods.regularized import Regularized, Regularizer
from condu.tasks.reference import ReferenceSet, read_reference
from condu.training import shuffled_batches, task_seed
from condu.tuning import Trained
from condu.workspace import Workspace


class WeightAverage:
    """The running average of weights while they are trained, which they become in the end.

    Begins with the `live` weights as they are, as the first of n = 1; at every `every`-th step
    θ_we ← (n·θ_we + θ) / (n + 1), then n ← n + 1. The last of `steps` counts whether or not it is
    an `every`-th, so that no short training comes to nothing.
    """

    def __init__(self, live: Mapping[str, Tensor], *, every: int, steps: int) -> None:
        self.start = {name: value.detach().clone() for name, value in live.items()}
        self._live = live  # not detached yet: their memory may move when processes share a model
        self._average = {name: value.clone() for name, value in self.start.items()}
        self._every, self._left = every, steps
        self._steps, self._models = 0, 1

    def after_step(self, optimizer: torch.optim.Optimizer) -> None:
        """To be called after each step of the optimiser, which goes on from where it is."""
        self._steps, self._left = self._steps + 1, self._left - 1
        if self._steps % self._every and self._left:
            return
        share = self._models / (self._models + 1)
        live = {name: value.detach() for name, value in self._live.items()}
        cx.average_(self._average, live, share, check=False)  # the loss tells of NaN, later
        self._models += 1
        if not self._left:
            write(live, self._average)


@register
class ZSCL(Regularized):
    """Cross-entropy + the distillation loss on reference images and captions, with θ_0 for teacher
    (`condu.distillation`) + l2·‖θ − θ_start‖², where θ_start is what the task started from; of the
    weights, the average is what is kept and what the next task starts from.

    The paper's references are ImageNet's images and Conceptual Captions' validation captions, which
    the section `zscl` names; without them it is those that the benchmark comes with.
    """

    name: ClassVar[str] = "zscl"

    def __init__(self, workspace: Workspace) -> None:
        super().__init__(workspace)
        self.reference = self._reference()

    def regularizer(self, index: int, start: Trained | None) -> Regularizer:
        tuner, config = self.tuner, self.workspace.config.zscl
        distillation = self._distillation
        live = {n: p for n, p in self.clip.model.named_parameters() if p.requires_grad}
        steps = tuner.training.steps
        with tuner.using(start.load() if start else {}):
            average = WeightAverage(live, every=config.average_every, steps=steps)
        batches = iter(self._batches(index, steps))

        def penalty(model: nn.Module, batch: Any) -> Tensor:
            moved = [(p - average.start[n]).square().sum() for n, p in live.items()]
            return distillation(model, next(batches)) + config.l2 * torch.stack(moved).sum()

        return Regularizer(penalty, average.after_step)

    @cached_property
    def _distillation(self) -> Distillation:
        """Made at first use, when the live model holds θ_0."""
        return Distillation(
            self.clip,
            self.reference.captions,
            temperature=self.workspace.config.zscl.temperature,
            batch_size=self.workspace.config.evaluation.batch_size,
        )

    def _batches(self, index: int, steps: int) -> Any:
        """Reference images on the device, of each process its part; other ones in each task."""
        config, task = self.workspace.config, self.workspace.benchmark.tasks[index]
        return self.workspace.accelerator.prepare_data_loader(
            shuffled_batches(
                self.reference.dataset(self.clip.test_transform),
                steps,
                config.zscl.batch_size,
                seed=task_seed(config.seed, f"reference of {task.name}"),
            )
        )

    def _reference(self) -> ReferenceSet:
        config, benchmark = self.workspace.config.zscl, self.workspace.benchmark
        if config.images is not None and config.captions is not None:
            try:
                return read_reference(config.images, config.captions)
            except ValueError as error:
                raise ConfigError(f"zscl.{error}") from None
        if benchmark.reference is None:
            raise ConfigError(
                f"methods: 'zscl' needs reference data, of which benchmark {benchmark.name!r} comes"
                " with none: zscl.images and zscl.captions have to name some"
            )
        return benchmark.reference()
