"""The pretrained model, never trained: the line that Transfer is held against."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, ClassVar

from condu.evaluation import Evaluator, Row
from condu.methods.base import Method, register
from condu.record import Learned

if TYPE_CHECKING:
    from condu.evaluation import Protocol


@register
class ZeroShot(Method):
    """One model for every image, whatever is known of it."""

    name: ClassVar[str] = "zero_shot"

    def learn(self, index: int) -> Learned:
        return Learned()

    def rows(self, index: int, protocols: Sequence[Protocol]) -> dict[Protocol, Row]:
        scorer = self.workspace.scorer
        if isinstance(scorer, Evaluator):
            return scorer.frozen_rows(index + 1, protocols)
        row = [self.workspace.zero_shot_accuracy(j) for j in range(len(self.workspace.benchmark))]
        return {protocol: Row(row) for protocol in protocols}
