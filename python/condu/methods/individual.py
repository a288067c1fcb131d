"""One fine-tuned model for each task, all kept: the upper line, at T times the memory."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, ClassVar

from condu.evaluation import Row
from condu.methods.base import Method, register
from condu.record import Learned
from condu.workspace import Tuning, Workspace

if TYPE_CHECKING:
    from condu.evaluation import Protocol


@register
class Individual(Method):
    """A seen task is answered by its own model, an unseen one by the pretrained model. There is
    nothing to choose a model by when the task is unknown, so the only protocol is `task-id`."""

    name: ClassVar[str] = "individual"
    protocols: tuple[Protocol, ...] = ("task-id",)

    def __init__(self, workspace: Workspace) -> None:
        super().__init__(workspace)
        self._accuracy: dict[int, float] = {}

    def learn(self, index: int) -> Learned:
        return Learned.by(self.tuner.finetune(index))

    def rows(self, index: int, protocols: Sequence[Protocol]) -> dict[Protocol, Row]:
        row = [
            self._own_accuracy(j) if j <= index else self.workspace.zero_shot_accuracy(j)
            for j in range(len(self.workspace.benchmark))
        ]
        return {protocol: Row(row) for protocol in protocols}

    def _own_accuracy(self, index: int) -> float:
        """Accuracy of a task's own model, which never changes: measured once."""
        if index not in self._accuracy:
            with self.tuner.using(self.tuner.finetuned(index).load()):
                task = self.workspace.benchmark.tasks[index]
                self._accuracy[index] = self.tuner.scorer.accuracy(task)
        return self._accuracy[index]


@register
class IndividualLoRA(Individual):
    """An adapter for each task: the upper line of all methods that fine-tune adapters."""

    name: ClassVar[str] = "individual_lora"
    tuning: ClassVar[Tuning] = "lora"
