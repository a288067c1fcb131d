"""Which task an image is of, named by its nearest class prototype: what is described publicly of
DPeCLIP, without what it trains.

Boosting Open-Domain Continual Learning via Leveraging Intra-domain Category-aware Prototype,
arXiv 2408.09984.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, ClassVar

from condu.evaluation import Evaluator
from condu.labels import Protocol
from condu.methods.base import Method, clip_model_of, register
from condu.methods.condu import ConDUFineTuning
from condu.record import Learned
from condu.voting import SemanticVoting
from condu.workspace import Workspace

if TYPE_CHECKING:
    from condu.evaluation import Row
    from condu.reconstruction import Fused


@register
class DPeCLIPId(Method):
    """Not DPeCLIP, whose published rows it is no reproduction of.

    DPeCLIP's: a classifier of tasks that needs no training, the task of an image being that of the
    class prototype which is nearest to its frozen features; and that the answer is then one of that
    task's classes alone (`union-odcl-cil`, where labels are not given).

    Not DPeCLIP's: who answers. DPeCLIP trains prompts into which prototypes are injected; here it
    is the expert of the named task, decoupled from a unified model as in `condu`, or the pretrained
    model, in which case nothing is trained at all (`dpeclip_id.answers`). Prototypes are those of
    `condu` too, of images and of texts. A task that was not learnt has none, so that `union-x-tail`
    is not offered: every image of such a task would be wrong.

    Rows hold for votes the tasks that were named; with `task-id` a task that was learnt is not
    asked for.
    """

    name: ClassVar[str] = "dpeclip_id"
    protocols: tuple[Protocol, ...] = ("task-id", "agnostic", "union-odcl-cil")

    def __init__(self, workspace: Workspace) -> None:
        super().__init__(workspace)
        clip_model_of(self)
        by_experts = workspace.config.dpeclip_id.answers == "experts"
        self._experts = UnifiedExperts(workspace) if by_experts else None

    def learn(self, index: int) -> Learned:
        if self._experts is not None:
            return self._experts.learn(index)
        if not self.workspace.accelerator.is_main_process:
            return Learned()
        began = time.perf_counter()
        self.workspace.add_prototypes(self.workspace.benchmark.tasks[index])
        return Learned(evaluate=time.perf_counter() - began)

    def rows(self, index: int, protocols: Sequence[Protocol]) -> dict[Protocol, Row]:
        scorer = self.tuner.scorer
        assert isinstance(scorer, Evaluator)  # of a CLIP model
        return scorer.fused_rows(
            self._experts.fusion if self._experts is not None else None,
            self.workspace.prototypes,
            SemanticVoting(k=1),
            protocols=protocols,
            own_classes=True,
        )

    def fused(self, index: int) -> Fused | None:
        return self._experts.fused(index) if self._experts is not None else None


class UnifiedExperts(ConDUFineTuning):
    """The unified model of `condu`, in the folder of this method."""

    name: ClassVar[str] = DPeCLIPId.name
