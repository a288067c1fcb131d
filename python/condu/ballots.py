"""Ballots: what the experts say of one data set's images, weighted by the votes."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from condu.labels import LabelSet
from condu.voting import SemanticVoting, Votes

if TYPE_CHECKING:
    from condu.tasks.benchmark import Task


@dataclass(frozen=True, eq=False)
class Ballot:
    """The votes of one data set's images, and the running weighted sum ``scores`` [N, labels] of
    the experts' answers among ``labels``; ``truth`` int64 [N] are the right ones.

    ``own_classes``: an expert chooses among the classes of its own task alone, as long as they are
    among the labels. That takes a voting over probabilities: nothing said must count for less than
    anything said.
    """

    task: Task
    labels: LabelSet
    votes: Votes
    voting: SemanticVoting
    scores: Tensor
    truth: Tensor
    own_classes: bool = False

    def weight(self, expert: int) -> Tensor:
        """Weight [N] of an expert on each image, 0 where it was not voted for."""
        return (self.votes.weights * (self.votes.experts == expert)).sum(dim=1)

    def choice_of(self, expert: str | None) -> tuple[tuple[Task, ...], slice]:
        """The tasks among whose classes an expert chooses (None: the pretrained model), and where
        these are among the labels."""
        if self.own_classes and expert in self.labels.names:
            position = self.labels.names.index(expert)
            return self.labels.tasks[position : position + 1], self.labels.block(expert)
        return self.labels.tasks, slice(None)

    def add(self, indices: Tensor, columns: slice, logits: Tensor, weight: Tensor) -> None:
        """Count one expert's ``logits`` [M, columns] for the images ``indices`` int64 [M] with the
        weights [M]."""
        self.scores[indices, columns] += weight.unsqueeze(1) * self.voting.scores(logits)

    def first_choices(self, tasks: int) -> list[int]:
        """Images of which each of so many tasks is the first choice."""
        return torch.bincount(self.votes.first_choices, minlength=tasks).tolist()

    def accuracy(self) -> float:
        return percent_right(self.scores, self.truth)


def by_voters(
    ballots: Iterable[Ballot], expert: int
) -> Iterator[tuple[Task, Tensor, list[tuple[Ballot, Tensor]]]]:
    """For each data set on which an expert was voted for: its task, int64 indices [M] of the images
    that voted for it on any ballot, and those ballots with its weights [M] on these images."""
    chosen: dict[str, list[tuple[Ballot, Tensor]]] = {}
    for ballot in ballots:
        weight = ballot.weight(expert)
        if bool((weight > 0).any()):
            chosen.setdefault(ballot.task.name, []).append((ballot, weight))
    for same in chosen.values():
        voters = torch.stack([weight > 0 for _, weight in same]).any(dim=0)
        indices = voters.nonzero().flatten()
        yield same[0][0].task, indices, [(ballot, weight[indices]) for ballot, weight in same]


def percent_right(scores: Tensor, truth: Tensor) -> float:
    """Percent of rows of ``scores`` [N, C] that are highest at ``truth`` int64 [N]."""
    return 100.0 * int((scores.argmax(dim=1) == truth).sum()) / len(truth)
