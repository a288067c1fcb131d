"""One model, fine-tuned on one task after another with something that keeps it from forgetting."""

from __future__ import annotations

from abc import abstractmethod
from typing import ClassVar, NamedTuple

from condu.methods.base import clip_model_of
from condu.methods.sequential import Sequential
from condu.record import Learned
from condu.training import AfterStep, Penalty
from condu.tuning import Trained
from condu.workspace import Workspace


class Regularizer(NamedTuple):
    """What goes on in a fine-tuning beside the objective."""

    penalty: Penalty
    after_step: AfterStep | None = None


class Regularized(Sequential):
    """As `sequential`, but with a regularizer in every task, the first included: what θ_0 knows is
    not to be forgotten either. Of CLIP models, whose images and texts can be compared."""

    shares_first: ClassVar[bool] = False

    def __init__(self, workspace: Workspace) -> None:
        super().__init__(workspace)
        self.clip = clip_model_of(self)

    @abstractmethod
    def regularizer(self, index: int, start: Trained | None) -> Regularizer:
        """For fine-tuning on task `index` from `start`, or from θ_0 if that is None."""

    def learn(self, index: int) -> Learned:
        start = self._latest(index - 1) if index else None
        penalty, after_step = self.regularizer(index, start)
        trained = self.tuner.train(
            self._file, index, start=start, penalty=penalty, after_step=after_step
        )
        return Learned.by(trained)
