"""One model, fine-tuned on one task after another: the line that shows forgetting."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from condu.methods.base import Method, Seconds, register
from condu.workspace import Trained

if TYPE_CHECKING:
    from condu.evaluation import Protocol


@register
class Sequential(Method):
    """One model for every image, so both protocols are the same. Only the latest is kept."""

    name: ClassVar[str] = "sequential"

    def learn(self, index: int) -> Seconds:
        workspace = self.workspace
        if index == 0:  # θ_0 is where every task's own model starts too: nothing is trained twice
            return Seconds(train=workspace.finetune(0).seconds)
        trained = workspace.train(self._file, index, start=self._latest(index - 1))
        return Seconds(train=trained.seconds)

    def rows(self, index: int, protocols: Sequence[Protocol]) -> dict[Protocol, list[float]]:
        with self.workspace.using(self._latest(index).load()):
            row = self.workspace.evaluator.accuracies()
        return {protocol: list(row) for protocol in protocols}

    @property
    def _file(self) -> Path:
        return self.workspace.folder / self.name / "model.safetensors"

    def _latest(self, index: int) -> Trained:
        """The model on disk after task `index`, or after the next one if a kill came in between."""
        return Trained.open(self._file) if index else self.workspace.finetuned(0)
