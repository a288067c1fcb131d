"""Accuracy of a live CLIP model, and of the experts behind a unified model, on the datasets of a
benchmark.

One fused pass answers every dataset and both protocols at once. Images are grouped by the experts
that were voted for, so each expert's weights are decoupled once per pass, its text head is computed
once per label set, and no expert sees an image that did not vote for it. What depends on the
pretrained model alone is computed once and kept.

- ``task-id``: the dataset is known. Seen task: its own expert; unseen task: voting.
- ``agnostic``: only the label set of the dataset is known; voting chooses the experts for every
  dataset.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, TensorDataset

from condu.features import encode_images, mean_text_features, prompt_tokens, zero_shot_head
from condu.progress import RunProgress
from condu.prototypes import PrototypeSet
from condu.voting import PRETRAINED, SemanticVoting, Votes

if TYPE_CHECKING:
    from condu.feature_cache import FeatureCache
    from condu.fusion import ConDU
    from condu.models.base import Autocast
    from condu.models.clip import ClipModel
    from condu.tasks.benchmark import Benchmark, Task, TransformedDataset

__all__ = ["Evaluator", "Protocol", "Row", "zero_shot_head"]

Protocol = Literal["task-id", "agnostic"]


@dataclass(frozen=True)
class Row:
    """One row of an accuracy matrix.

    ``accuracy``: percent per dataset, unrounded, in the order of the datasets. ``votes[d][e]``:
    images of dataset d that expert e answered; one column per task of the prototype set, in its
    order, and a last one for the pretrained model. None where nobody votes.
    """

    accuracy: list[float]
    votes: list[list[int]] | None = None


class Evaluator:
    """Evaluates the model of ``clip`` on the test sets of ``benchmark``; one evaluator belongs to
    one θ_0.

    Decoded test images stay in host memory as long as all of them together fit into
    ``cache_bytes``; datasets beyond that are read through a DataLoader with ``num_workers`` on each
    pass. Inputs go to the device where the model's parameters are. ``autocast`` makes the context
    in which the model encodes; what is made of its features is float32 whatever that is.
    The attributes ``cache``, where features for prototypes and for voting outlive the process, and
    ``progress``, which shows how far encoding is, may be set by the owner.
    """

    def __init__(
        self,
        clip: ClipModel,
        benchmark: Benchmark,
        *,
        batch_size: int = 256,
        num_workers: int = 0,
        cache_bytes: int = 4 << 30,
        autocast: Autocast = nullcontext,
    ) -> None:
        self.clip = clip
        self.benchmark = benchmark
        self._batch_size = batch_size
        self._num_workers = num_workers
        self._cache_bytes = cache_bytes
        self._autocast = autocast
        self.cache: FeatureCache | None = None
        self.progress = RunProgress()  # which shows nothing
        self._tests: dict[str, Dataset[Any]] = {}
        self._tokens: dict[str, Tensor] = {}
        self._frozen: dict[str, FrozenAnswers] = {}

    def over(self, clip: ClipModel) -> Evaluator:
        """The same over another live model, sharing what was read and computed already. At θ_0 the
        other model must compute what this one does, as one with fresh adapters does.
        """
        other = copy.copy(self)
        other.clip = clip
        return other

    def accuracy(self, task: Task) -> float:
        """Percent of the task's test images that the live weights, whatever they are, classify
        right among its classes.
        """
        features, labels = self._encode(self._test_set(task))
        return _percent_right(self._logits(features, task), labels)

    def accuracies(self) -> list[float]:
        """``accuracy`` on every dataset of the benchmark, in its order."""
        return [self.accuracy(task) for task in self.benchmark]

    def add_prototypes(self, prototypes: PrototypeSet, task: Task, fusion: ConDU) -> None:
        """Add the prototypes of a task from its training images (through the test transform) and
        all its templates.

        Puts the model at θ_0 first, so absorb fine-tuned weights before.
        """
        fusion.reset()
        features, labels = self.train_features(task)
        prototypes.add(task.name, features, labels, self._kept_text(task))

    def train_features(self, task: Task) -> tuple[Tensor, Tensor]:
        """Normalised features float32 [M, D] and labels int64 [M] of a task's training images
        (through the test transform) under the live weights.
        """
        train = _not_empty(task.dataset("train", self.clip.test_transform), task, "train")
        return self._kept_features(train, train)

    def agnostic_accuracy(
        self, task: Task, fusion: ConDU, prototypes: PrototypeSet, voting: SemanticVoting
    ) -> float:
        """Accuracy in percent on one dataset, experts by voting. For several datasets
        ``fused_rows`` is the cheaper call.
        """
        rows = self.fused_rows(fusion, prototypes, voting, protocols=("agnostic",), tasks=(task,))
        return rows["agnostic"].accuracy[0]

    def fused_rows(
        self,
        fusion: ConDU,
        prototypes: PrototypeSet,
        voting: SemanticVoting,
        *,
        protocols: Sequence[Protocol] = ("task-id", "agnostic"),
        tasks: Sequence[Task] | None = None,
    ) -> dict[Protocol, Row]:
        """The row of each protocol over ``tasks`` (default: the whole benchmark), all in one pass
        over the experts.

        Puts the model at θ_0 first and again at the end, also after an error. Raises ValueError for
        an unknown protocol, an empty test set, and when the tasks with prototypes are not the tasks
        with experts.
        """
        for protocol in protocols:
            if protocol not in get_args(Protocol):
                raise ValueError(f"protocol must be one of {get_args(Protocol)}, got {protocol!r}")
        if set(prototypes.tasks) != set(fusion.tasks):
            raise ValueError(
                f"prototypes of tasks {list(prototypes.tasks)} but experts of {list(fusion.tasks)}"
            )
        fusion.reset()
        datasets = tuple(self.benchmark) if tasks is None else tuple(tasks)
        # both protocols vote on an unseen dataset: the same ballot, answered once
        ballots: dict[tuple[str, bool], _Ballot] = {}
        for protocol in protocols:
            for task in datasets:
                key = _ballot_key(protocol, task, prototypes)
                if key not in ballots:
                    ballots[key] = self._ballot(task, key[1], prototypes, voting)
        try:
            for expert in (PRETRAINED, *range(len(prototypes))):
                self._answer(expert, ballots.values(), fusion, prototypes)
        finally:
            fusion.reset()
        rows: dict[Protocol, Row] = {}
        for protocol in protocols:
            row = [ballots[_ballot_key(protocol, task, prototypes)] for task in datasets]
            rows[protocol] = Row(
                [ballot.accuracy() for ballot in row],
                [ballot.turnout(len(prototypes)) for ballot in row],
            )
        return rows

    def _ballot(
        self, task: Task, own: bool, prototypes: PrototypeSet, voting: SemanticVoting
    ) -> _Ballot:
        frozen = self.frozen_answers(task)
        if own:
            expert = prototypes.tasks.index(task.name)
            shape = (len(frozen.features), 1)
            votes = Votes(torch.full(shape, expert), torch.ones(shape))
        else:
            votes = voting.vote(frozen.features, prototypes)
        scores = torch.zeros_like(frozen.logits)
        return _Ballot(task, votes, voting, scores, frozen.labels)

    def _answer(
        self,
        expert: int,
        ballots: Iterable[_Ballot],
        fusion: ConDU,
        prototypes: PrototypeSet,
    ) -> None:
        """Let one expert answer all images, of any dataset, that voted for it on any ballot."""
        weights: dict[str, list[tuple[_Ballot, Tensor]]] = {}
        for ballot in ballots:
            weight = ballot.weight(expert)
            if bool((weight > 0).any()):
                weights.setdefault(ballot.task.name, []).append((ballot, weight))
        if weights and expert != PRETRAINED:
            fusion.activate(prototypes.tasks[expert])
        for same_dataset in weights.values():
            task = same_dataset[0][0].task
            voters = torch.stack([weight > 0 for _, weight in same_dataset]).any(dim=0)
            indices = voters.nonzero().flatten()
            if expert == PRETRAINED:
                logits = self.frozen_answers(task).logits[indices]
            else:
                features, _ = self._encode(self._test_set(task), indices)
                logits = self._logits(features, task)
            for ballot, weight in same_dataset:
                ballot.add(indices, logits, weight[indices])

    def frozen_answers(self, task: Task) -> FrozenAnswers:
        """Answers of the pretrained model on a test set; the first call needs the model to be at
        θ_0.
        """
        if task.name not in self._frozen:
            test = task.dataset("test", self.clip.test_transform)
            features, labels = self._kept_features(test, self._test_set(task))
            self._frozen[task.name] = FrozenAnswers(features, labels, self._logits(features, task))
        return self._frozen[task.name]

    def _kept_features(
        self, dataset: TransformedDataset, images: Dataset[Any]
    ) -> tuple[Tensor, Tensor]:
        """Features and labels of ``images``, which are those of ``dataset``."""
        if self.cache is None:
            return self._encode(images)
        with self._autocast():
            return self.cache.images(self.clip.model, dataset, lambda: self._encode(images))

    def _kept_text(self, task: Task) -> Tensor:
        if self.cache is None:
            return self._mean_text(task)
        tokens = prompt_tokens(self.clip.tokenize, task)
        with self._autocast():
            return self.cache.text(self.clip.model, tokens, lambda: self._mean_text(task))

    def _encode(self, images: Dataset[Any], indices: Tensor | None = None) -> tuple[Tensor, Tensor]:
        count = len(images if indices is None else indices)  # type: ignore[arg-type]
        with self._autocast(), self.progress.images("encoding images", count) as advance:
            return encode_images(
                self.clip.model,
                images,
                indices,
                batch_size=self._batch_size,
                num_workers=self._num_workers,
                advance=advance,
            )

    def _logits(self, features: Tensor, task: Task) -> Tensor:
        """exp(logit_scale)·cosine with the live model's text head, float32 [M, classes]."""
        head = F.normalize(self._mean_text(task), dim=-1)
        scale: Any = self.clip.model.logit_scale
        return float(scale.detach().exp()) * features @ head.T

    def _mean_text(self, task: Task) -> Tensor:
        if task.name not in self._tokens:
            self._tokens[task.name] = prompt_tokens(self.clip.tokenize, task)
        with self._autocast():
            return mean_text_features(
                self.clip.model, self._tokens[task.name], batch_size=self._batch_size
            )

    def _test_set(self, task: Task) -> Dataset[Any]:
        if task.name not in self._tests:
            test = _not_empty(task.dataset("test", self.clip.test_transform), task, "test")
            image, _ = test[0]
            held = [
                t.tensors[0].nbytes for t in self._tests.values() if isinstance(t, TensorDataset)
            ]
            if sum(held) + image.nbytes * len(test) <= self._cache_bytes:
                test = _decoded(test, self._num_workers)
            self._tests[task.name] = test
        return self._tests[task.name]


@dataclass(frozen=True)
class FrozenAnswers:
    """The pretrained model on one test set: normalised features float32 [N, D], labels int64 [N],
    logits float32 [N, classes], all on the CPU."""

    features: Tensor
    labels: Tensor
    logits: Tensor


@dataclass(frozen=True)
class _Ballot:
    """The votes of one dataset's images and the running weighted sum ``scores`` [N, classes] of the
    experts' answers.
    """

    task: Task
    votes: Votes
    voting: SemanticVoting
    scores: Tensor
    labels: Tensor

    def weight(self, expert: int) -> Tensor:
        """Weight [N] of an expert on each image, 0 where it was not voted for."""
        return (self.votes.weights * (self.votes.experts == expert)).sum(dim=1)

    def add(self, indices: Tensor, logits: Tensor, weight: Tensor) -> None:
        self.scores[indices] += weight.unsqueeze(1) * self.voting.scores(logits)

    def turnout(self, tasks: int) -> list[int]:
        return [int((self.weight(e) > 0).sum()) for e in (*range(tasks), PRETRAINED)]

    def accuracy(self) -> float:
        return _percent_right(self.scores, self.labels)


def _ballot_key(protocol: Protocol, task: Task, prototypes: PrototypeSet) -> tuple[str, bool]:
    return task.name, protocol == "task-id" and task.name in prototypes


def _percent_right(scores: Tensor, labels: Tensor) -> float:
    return 100.0 * int((scores.argmax(dim=1) == labels).sum()) / len(labels)


def _not_empty(dataset: Any, task: Task, split: str) -> Any:
    if len(dataset) == 0:
        raise ValueError(f"task {task.name!r}: the {split} set is empty")
    return dataset


def _decoded(dataset: Any, num_workers: int) -> TensorDataset:
    """All images and labels as two tensors, read once."""
    images: Tensor | None = None
    labels = torch.empty(len(dataset), dtype=torch.int64)
    done = 0
    for batch, batch_labels in DataLoader(dataset, batch_size=256, num_workers=num_workers):
        if images is None:
            images = batch.new_empty(len(dataset), *batch.shape[1:])
        images[done : done + len(batch)] = batch
        labels[done : done + len(batch)] = batch_labels
        done += len(batch)
    assert images is not None
    return TensorDataset(images, labels)
