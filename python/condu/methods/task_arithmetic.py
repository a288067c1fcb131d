"""Task arithmetic: one model, θ_0 and a multiple of the sum of all delta models.

Editing Models with Task Arithmetic, arXiv 2212.04089.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor

from condu.methods.base import Method, register
from condu.record import Learned
from condu.weights import copy_weights

if TYPE_CHECKING:
    from condu.evaluation import Protocol, Row


@register
class TaskArithmetic(Method):
    """θ_0 + λ·Σ d_i over the tasks so far, each fine-tuned from θ_0; λ is `task_arithmetic.scale`.
    The paper chooses λ on held-out data of all tasks; 0.3 is a usual value where there is none.

    One model for every image, whatever is known of it. Buffers stay at θ_0: statistics do not add
    up.
    """

    name: ClassVar[str] = "task_arithmetic"

    def learn(self, index: int) -> Learned:
        finetuned = self.tuner.finetune(index)
        if not self.workspace.accelerator.is_main_process:
            return Learned.by(finetuned)
        began = time.perf_counter()
        self._weights = self._merged(index)
        return Learned.by(finetuned, fuse=time.perf_counter() - began)

    def rows(self, index: int, protocols: Sequence[Protocol]) -> dict[Protocol, Row]:
        with self.tuner.using(self._weights):
            return self.tuner.scorer.rows(index + 1, protocols)

    def _merged(self, index: int) -> dict[str, Tensor]:
        """Over tasks 0 … index, of which one at a time is in memory beside θ_0 and the sum."""
        model, scale = self.tuner.live.model, self.workspace.config.task_arithmetic.scale
        names = [name for name, p in model.named_parameters() if p.requires_grad]
        pretrained = copy_weights(model, names)
        total = {name: torch.zeros_like(value) for name, value in pretrained.items()}
        for task in range(index + 1):
            finetuned = self.tuner.finetuned(task).load()
            for name, value in total.items():
                value += finetuned[name] - pretrained[name]
        return {name: pretrained[name] + scale * value for name, value in total.items()}
