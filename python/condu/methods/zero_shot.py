"""The pretrained model, never trained: the line that Transfer is held against."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, ClassVar

from condu.evaluation import Row
from condu.methods.base import Learned, Method, register

if TYPE_CHECKING:
    from condu.evaluation import Protocol


@register
class ZeroShot(Method):
    """One model for every image, so both protocols are the same."""

    name: ClassVar[str] = "zero_shot"

    def learn(self, index: int) -> Learned:
        return Learned()

    def rows(self, index: int, protocols: Sequence[Protocol]) -> dict[Protocol, Row]:
        row = [self.workspace.zero_shot_accuracy(j) for j in range(len(self.workspace.benchmark))]
        return {protocol: Row(row) for protocol in protocols}
