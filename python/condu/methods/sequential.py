"""One model, fine-tuned on one task after another: the line that shows forgetting."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from condu.methods.base import Method, register
from condu.record import Learned
from condu.tuning import Trained
from condu.workspace import Tuning

if TYPE_CHECKING:
    from condu.evaluation import Protocol, Row


@register
class Sequential(Method):
    """One model for every image, whatever is known of it. Only the latest is kept."""

    name: ClassVar[str] = "sequential"
    shares_first: ClassVar[bool] = True
    """Whether the model after the first task is that task's fine-tuning, as of other methods."""

    def learn(self, index: int) -> Learned:
        if index == 0:  # θ_0 is where every task's own model starts too: nothing is trained twice
            return Learned.by(self.tuner.finetune(0))
        return Learned.by(self.tuner.train(self._file, index, start=self._latest(index - 1)))

    def rows(self, index: int, protocols: Sequence[Protocol]) -> dict[Protocol, Row]:
        with self.tuner.using(self._latest(index).load()):
            return self.tuner.scorer.rows(index + 1, protocols)

    @property
    def _file(self) -> Path:
        return self.folder / "model.safetensors"

    def _latest(self, index: int) -> Trained:
        """The model on disk after task `index`, or after the next one if a kill came in between."""
        shared = self.shares_first and index == 0
        return self.tuner.finetuned(0) if shared else Trained.open(self._file)


@register
class SequentialLoRA(Sequential):
    """One adapter, fine-tuned on one task after another: what aligned merging is held against."""

    name: ClassVar[str] = "sequential_lora"
    tuning: ClassVar[Tuning] = "pam"
