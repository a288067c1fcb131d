"""EMR-Merging: every delta model is kept, and all are unified at once.

EMR-Merging: Tuning-Free High-Performance Model Merging, arXiv 2405.17461.
"""

from __future__ import annotations

import time
from typing import ClassVar

from torch import Tensor

import condu_ext as cx
from condu.methods.base import register
from condu.methods.condu import ConDUFineTuning


@register
class EMR(ConDUFineTuning):
    """What continual fusion gives up: unified from the fine-tuned models themselves, where `condu`
    has only what earlier fusions left of them. Needs all T models on disk and in memory at a time.

    After each task those so far are unified once; elect, mask, rescale and voting are those of
    `condu`, so that the rows differ in nothing else.
    """

    name: ClassVar[str] = "emr"

    def fuse(self, index: int) -> float:
        fusion = self.fusion
        tasks = self.workspace.benchmark.tasks[: index + 1]
        models = {task.name: self._finetuned(position) for position, task in enumerate(tasks)}
        began = time.perf_counter()
        fusion.state = cx.unify(
            models,
            fusion.pretrained,
            rule=fusion.state.rule,
            dtype=fusion.state.dtype,
            private=fusion.state.spec.private,
        )
        return time.perf_counter() - began

    def _finetuned(self, index: int) -> dict[str, Tensor]:
        """What is fused of a task's fine-tuned model, where θ_0 is."""
        weights = self.tuner.finetuned(index).load()
        base = self.fusion.pretrained
        return {name: weights[name].to(value.device) for name, value in base.items()}
