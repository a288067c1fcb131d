"""What every expert of one session answers to every test image, and what that makes of a vote.

All experts answer everything once; then each way to vote is arithmetic on their answers.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from condu.ablation.variants import Variant
from condu.prototypes import PrototypeSet
from condu.voting import task_similarities

if TYPE_CHECKING:
    from condu.ablation.experts import AblatedExperts
    from condu.ablation.ground import Ground
    from condu.labels import Protocol


class SessionAnswers:
    """Answers of all ``experts`` and of the pretrained model; θ_0 is live before and after."""

    def __init__(self, ground: Ground, experts: AblatedExperts) -> None:
        self._ground = ground
        self._tasks = experts.tasks
        scorer, benchmark = ground.scorer, ground.benchmark
        self._frozen = [scorer.frozen_answers(task) for task in benchmark]
        logits: list[list[Tensor]] = [[] for _ in benchmark]
        own: list[list[Tensor]] = [[] for _ in benchmark]
        scorer = scorer.over(ground.clip)
        scorer.cache = None  # no other run has these experts
        try:
            for name in experts.tasks:
                experts.activate(name)
                prototypes = PrototypeSet()
                prototypes.add(name, *scorer.prototype_features(benchmark[name]))
                for place, task in enumerate(benchmark):
                    features, _ = scorer.test_features(task)
                    logits[place].append(scorer.logits(features, (task,), {}))
                    own[place].append(task_similarities(features, prototypes)[:, 0])
        finally:
            experts.reset()
        # the pretrained model last, so that PRETRAINED = -1 is its index
        self._logits = [
            torch.stack([*of_experts, frozen.logits], dim=1)
            for of_experts, frozen in zip(logits, self._frozen, strict=True)
        ]
        self._own = [torch.stack(similarities, dim=1) for similarities in own]

    def row(self, variant: Variant, protocol: Protocol) -> list[float]:
        """Accuracy in percent on every data set with a variant's prototypes and votes."""
        return [
            self._accuracy(place, variant, own=protocol == "task-id" and task.name in self._tasks)
            for place, task in enumerate(self._ground.benchmark)
        ]

    def _accuracy(self, place: int, variant: Variant, *, own: bool) -> float:
        labels = self._frozen[place].labels
        if own:
            scores = self._logits[place][:, place]
        else:
            votes = variant.voting.choose(self._similarities(place, variant))
            images = torch.arange(len(labels)).unsqueeze(1)
            scores = variant.voting.fuse(self._logits[place][images, votes.experts], votes.weights)
        return 100.0 * int((scores.argmax(dim=1) == labels).sum()) / len(labels)

    def _similarities(self, place: int, variant: Variant) -> Tensor:
        """Similarity float32 [N, tasks] of each image with each task learnt."""
        if variant.prototypes == "experts":
            return self._own[place]
        prototypes = self._ground.prototypes(variant.prototypes, len(self._tasks))
        return task_similarities(self._frozen[place].features, prototypes)
