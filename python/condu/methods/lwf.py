"""LwF: learn each task while answering its own images as the previous model did.

Learning without Forgetting, arXiv 1606.09282; for CLIP as ZSCL (arXiv 2303.06628) and its code
compare with it: ZSCL's distillation, with the current task for reference and the previous model
for teacher.
"""

from __future__ import annotations

from typing import ClassVar

from condu.distillation import Distillation
from condu.methods.base import register
from condu.methods.regularized import Regularized, Regularizer
from condu.tuning import Trained


@register
class LwF(Regularized):
    """Cross-entropy + the distillation loss on the batch, over the prompts that the task is trained
    with. The teacher is the model as the task found it: for the first task θ_0."""

    name: ClassVar[str] = "lwf"

    def regularizer(self, index: int, start: Trained | None) -> Regularizer:
        task = self.workspace.benchmark.tasks[index]
        with self.tuner.using(start.load() if start else {}):
            distillation = Distillation(
                self.clip, task.prompts, temperature=self.workspace.config.lwf.temperature
            )
        return Regularizer(lambda model, batch: distillation(model, batch[0]))
