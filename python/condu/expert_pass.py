"""One pass over the experts behind a unified model, which answers every data set and all protocols
at once.

Images are grouped by the experts that were voted for, so each expert's weights are decoupled once
per pass, its text head is computed once per task, and no expert sees an image that did not vote
for it.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from condu.ballots import Ballot, by_voters
from condu.labels import Protocol, label_set
from condu.prototypes import PrototypeSet
from condu.voting import PRETRAINED, SemanticVoting, Votes

if TYPE_CHECKING:
    from condu.evaluation import Evaluator, FrozenAnswers, Heads
    from condu.fusion import ConDU
    from condu.tasks.benchmark import Task


@dataclass(frozen=True)
class ExpertPass:
    """The experts of ``fusion`` (None: the pretrained model in the place of all of them), chosen by
    ``voting`` over ``prototypes``; ``own_classes`` is that of `condu.ballots.Ballot`."""

    evaluator: Evaluator
    fusion: ConDU | None
    prototypes: PrototypeSet
    voting: SemanticVoting
    own_classes: bool = False

    def ballots(
        self, tasks: Iterable[Task], protocols: Sequence[Protocol]
    ) -> dict[Protocol, list[Ballot]]:
        """A ballot for each data set and protocol; those that ask the same of the same experts are
        one. Needs the model to be at θ_0."""
        prepared: dict[Protocol, list[Ballot]] = {protocol: [] for protocol in protocols}
        benchmark, seen = self.evaluator.benchmark.tasks, self.prototypes.tasks
        for task in tasks:
            frozen = self.evaluator.frozen_answers(task)
            votes: dict[bool, Votes] = {}
            ballots: dict[tuple[bool, tuple[str, ...]], Ballot] = {}
            for protocol, row in prepared.items():
                labels = label_set(protocol, task, benchmark, seen)
                known = protocol == "task-id" and task.name in seen
                if known not in votes:
                    votes[known] = self._votes(task, known, frozen)
                if (known, labels.names) not in ballots:
                    ballots[known, labels.names] = Ballot(
                        task,
                        labels,
                        votes[known],
                        self.voting,
                        torch.zeros(len(frozen.labels), labels.size),
                        frozen.labels + labels.first,
                        self.own_classes,
                    )
                row.append(ballots[known, labels.names])
        return prepared

    def answer(self, ballots: Iterable[Ballot]) -> None:
        """Let every expert answer all images, of any data set, that voted for it on any of the
        ballots. Needs the model to be at θ_0, and leaves the last expert in it."""
        distinct = list(dict.fromkeys(ballots))
        for expert in (PRETRAINED, *range(len(self.prototypes))):
            name = None if expert == PRETRAINED else self.prototypes.tasks[expert]
            heads: Heads = {}
            for task, indices, cast in by_voters(distinct, expert):
                features = self._features(name, task, indices)
                answers: dict[tuple[str, ...], Tensor] = {}
                for ballot, weight in cast:
                    choice, columns = ballot.choice_of(name)
                    names = tuple(other.name for other in choice)
                    if names not in answers:
                        answers[names] = (
                            self.evaluator.frozen_logits(task, indices, choice)
                            if features is None
                            else self.evaluator.logits(features, choice, heads)
                        )
                    ballot.add(indices, columns, answers[names], weight)

    def _features(self, expert: str | None, task: Task, indices: Tensor) -> Tensor | None:
        """Of an expert, which is activated for it; None where the pretrained model answers, whose
        features are kept."""
        if expert is None or self.fusion is None:
            return None
        if self.fusion.active != expert:
            self.fusion.activate(expert)
        return self.evaluator.test_features(task, indices)[0]

    def _votes(self, task: Task, known: bool, frozen: FrozenAnswers) -> Votes:
        """Who answers a data set: the task's own expert where it is ``known``."""
        if not known:
            return self.voting.vote(frozen.features, self.prototypes)
        shape = (len(frozen.features), 1)
        expert = self.prototypes.tasks.index(task.name)
        return Votes(torch.full(shape, expert), torch.ones(shape))
