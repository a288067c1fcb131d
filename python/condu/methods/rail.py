"""RAIL: a frozen CLIP, and an adapter on its image features that a regression solves for exactly.

Advancing Cross-domain Discriminability in Continual Learning of Vision-Language Models,
arXiv 2406.18868. What both forms share: `rail_primal` and `rail_dual` have their own adapters.
"""

from __future__ import annotations

import time
from abc import abstractmethod
from collections.abc import Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from condu.ballots import percent_right
from condu.evaluation import Evaluator, Row
from condu.features import zero_shot_head
from condu.labels import label_set
from condu.methods.base import Method, clip_model_of
from condu.record import Learned
from condu.workspace import Workspace

if TYPE_CHECKING:
    from condu.evaluation import Protocol


def answer(zero_shot: Tensor, adapter: Tensor, weight: float) -> Tensor:
    """What is answered of zero-shot logits [N, C] and the adapter's answers [N, S] to the first S
    classes, which are those seen: float64 [N, C].

    p = softmax(logits); where its highest class is a seen one, (1 − weight)·p + weight·adapter.
    """
    scores = F.softmax(zero_shot.double(), dim=1)
    seen = adapter.shape[1]
    recognised = scores.argmax(dim=1) < seen
    adapted = F.pad(adapter.double(), (0, scores.shape[1] - seen))
    scores[recognised] = (1 - weight) * scores[recognised] + weight * adapted[recognised]
    return scores


class Rail(Method):
    """`task-id` and `union-odcl-cil`: over the classes that the protocol names alone; of a seen
    task zero-shot and adapter are fused, an unseen one is answered zero-shot. `union-x-tail` is
    RAIL's own: over the classes of all data sets it is decided which images the adapter has a say
    on, and the answer is the best of them all; `agnostic`: the same, and the best of the classes of
    the data set. The factor 100 of the paper's logits is the model's exp(logit_scale).

    Classes are numbered through all tasks in their order. Nothing is fine-tuned.
    """

    def __init__(self, workspace: Workspace) -> None:
        super().__init__(workspace)
        self.clip = clip_model_of(self)
        tasks = workspace.benchmark.tasks
        sizes = torch.tensor([0, *(len(task.classnames) for task in tasks)])
        self.offsets: list[int] = sizes.cumsum(0).tolist()

    @abstractmethod
    def absorb(self, index: int) -> None:
        """Bring task `index` into the adapter, and keep that on disk, unless it is there already;
        `features` gives what there is to learn."""

    @abstractmethod
    def adapter(self, features: Tensor) -> Tensor:
        """Answers float64 [N, classes seen] to features float32 [N, D], both on the CPU."""

    def learn(self, index: int) -> Learned:
        if not self.workspace.accelerator.is_main_process:
            return Learned()
        began = time.perf_counter()
        self.absorb(index)
        return Learned(train=time.perf_counter() - began)

    def rows(self, index: int, protocols: Sequence[Protocol]) -> dict[Protocol, Row]:
        weight = self.workspace.config.rail.weight
        rows: dict[Protocol, Row] = {protocol: Row([]) for protocol in protocols}
        tasks = self.workspace.benchmark.tasks
        seen = [task.name for task in tasks[: index + 1]]
        starts = {task.name: start for task, start in zip(tasks, self.offsets, strict=False)}
        for position, task in enumerate(tasks):
            frozen = self.evaluator.frozen_answers(task)
            adapter = self.adapter(frozen.features)
            logits = self._scale * frozen.features @ self._heads.T
            fused: Tensor | None = None
            for protocol, row in rows.items():
                labels = label_set(protocol, task, tasks, seen)
                start = starts[labels.names[0]]
                named = slice(start, start + labels.size)  # tasks are learnt in order: no gaps
                if protocol in ("task-id", "union-odcl-cil"):
                    own = adapter[:, named if position <= index else slice(0)]
                    scores = answer(logits[:, named], own, weight)
                else:
                    if fused is None:
                        fused = answer(logits, adapter, weight)
                    scores = fused[:, named]
                row.accuracy.append(percent_right(scores, frozen.labels + labels.first))
        return rows

    def features(self, index: int) -> tuple[Tensor, Tensor]:
        """Frozen features float32 [M, D] and labels int64 [M], numbered through all tasks, of the
        training images of task `index`."""
        features, labels = self.evaluator.train_features(self.workspace.benchmark.tasks[index])
        return features, labels + self.offsets[index]

    @property
    def evaluator(self) -> Evaluator:
        scorer = self.workspace.scorer
        assert isinstance(scorer, Evaluator)  # of a CLIP model
        return scorer

    @cached_property
    def _heads(self) -> Tensor:
        """Zero-shot classifier of all tasks [classes, D]; made when the live model holds θ_0."""
        model, tokenize = self.clip.model, self.clip.tokenize
        return torch.cat([zero_shot_head(model, tokenize, t) for t in self.workspace.benchmark])

    @cached_property
    def _scale(self) -> float:
        scale: Any = self.clip.model.logit_scale
        return float(scale.detach().exp())
