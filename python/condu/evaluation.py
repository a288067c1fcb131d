"""Accuracy of a live CLIP model, and of the experts behind a unified model, on the data sets of a
benchmark, under the protocols of `condu.labels`.

What depends on the pretrained model alone is computed once and kept. Where the data set is known
(``task-id``) and was learnt, its own expert answers it; in every other case voting chooses.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import Dataset

from condu.ballots import percent_right
from condu.decoded import DecodedTests, not_empty
from condu.expert_pass import ExpertPass, Experts
from condu.features import encode_images, mean_text_features, prompt_tokens, zero_shot_head
from condu.labels import Protocol, label_set
from condu.progress import RunProgress
from condu.prototypes import PrototypeSet
from condu.voting import SemanticVoting

if TYPE_CHECKING:
    from condu.feature_cache import FeatureCache
    from condu.models.base import Autocast
    from condu.models.clip import ClipModel
    from condu.tasks.benchmark import Benchmark, Task, TransformedDataset

__all__ = ["Evaluator", "Experts", "FrozenAnswers", "Protocol", "Row", "zero_shot_head"]


@dataclass(frozen=True)
class Row:
    """One row of an accuracy matrix.

    ``accuracy``: percent per dataset, unrounded, in the order of the datasets. ``votes[d][e]``:
    images of dataset d whose first choice was task e, the most similar one, or the one that is
    known; one column per task of the prototype set, in its order. None where nobody votes.
    """

    accuracy: list[float]
    votes: list[list[int]] | None = None


@dataclass(frozen=True)
class FrozenAnswers:
    """The pretrained model on one test set: normalised features float32 [N, D], labels int64 [N],
    logits float32 [N, classes], all on the CPU."""

    features: Tensor
    labels: Tensor
    logits: Tensor

    def accuracy(self) -> float:
        """Percent of the images that the pretrained model classifies right."""
        return percent_right(self.logits, self.labels)


Heads = dict[str, Tensor]
"""Text heads [classes, D] by task, all under the same weights."""


class Evaluator:
    """Evaluates the model of ``clip`` on the test sets of ``benchmark``; one evaluator belongs to
    one θ_0.

    Decoded test images stay in host memory as long as all of them together fit into
    ``cache_bytes`` (None: a quarter of what is available); datasets beyond that are read through a
    DataLoader with ``num_workers`` on each pass. Inputs go to the device where the model's
    parameters are. ``autocast`` makes the context in which the model encodes; what is made of its
    features is float32 whatever that is.
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
        cache_bytes: int | None = None,
        autocast: Autocast = nullcontext,
    ) -> None:
        self.clip = clip
        self.benchmark = benchmark
        self._batch_size = batch_size
        self._num_workers = num_workers
        self._autocast = autocast
        self.cache: FeatureCache | None = None
        self.progress = RunProgress()  # which shows nothing
        self._tests = DecodedTests(
            clip.test_transform, cache_bytes=cache_bytes, num_workers=num_workers
        )
        self._tokens: dict[str, Tensor] = {}
        self._frozen: dict[str, FrozenAnswers] = {}
        self._frozen_heads: Heads = {}

    def over(self, clip: ClipModel) -> Evaluator:
        """The same over another live model, sharing what was read and computed already. At θ_0 the
        other model must compute what this one does, as one with fresh adapters does."""
        other = copy.copy(self)
        other.clip = clip
        return other

    def anew(self, clip: ClipModel) -> Evaluator:
        """Over a live model with another θ_0, sharing the decoded images and nothing that depends
        on weights."""
        other = self.over(clip)
        other._frozen, other._frozen_heads = {}, {}
        return other

    def accuracy(self, task: Task) -> float:
        """Percent of the task's test images that the live weights classify right among its
        classes."""
        features, labels = self.test_features(task)
        return percent_right(self.logits(features, (task,), {}), labels)

    def rows(self, seen: int, protocols: Sequence[Protocol]) -> dict[Protocol, Row]:
        """The row of each protocol, after the first ``seen`` tasks of the benchmark, where the live
        weights, whatever they are, answer everything. Images and prompts are encoded once."""
        return self._rows(seen, protocols, self.test_features, {})

    def frozen_rows(self, seen: int, protocols: Sequence[Protocol]) -> dict[Protocol, Row]:
        """``rows`` of the pretrained model, of which nothing is encoded twice; the first call needs
        it to be live."""

        def encoded(task: Task) -> tuple[Tensor, Tensor]:
            frozen = self.frozen_answers(task)
            return frozen.features, frozen.labels

        return self._rows(seen, protocols, encoded, self._frozen_heads)

    def _rows(
        self,
        seen: int,
        protocols: Sequence[Protocol],
        encoded: Callable[[Task], tuple[Tensor, Tensor]],
        heads: Heads,
    ) -> dict[Protocol, Row]:
        tasks = self.benchmark.tasks
        learned = [task.name for task in tasks[:seen]]
        rows: dict[Protocol, Row] = {protocol: Row([]) for protocol in protocols}
        for task in tasks:
            features, truth = encoded(task)
            found: dict[tuple[str, ...], float] = {}
            for protocol, row in rows.items():
                labels = label_set(protocol, task, tasks, learned)
                if labels.names not in found:
                    logits = self.logits(features, labels.tasks, heads)
                    found[labels.names] = percent_right(logits, truth + labels.first)
                row.accuracy.append(found[labels.names])
        return rows

    def add_prototypes(
        self, prototypes: PrototypeSet, task: Task, fusion: Experts | None = None
    ) -> None:
        """Add the prototypes of a task from its training images (through the test transform) and
        all its templates.

        Puts the model of ``fusion`` at θ_0 first, so absorb fine-tuned weights before; without one
        the model has to be there.
        """
        if fusion is not None:
            fusion.reset()
        prototypes.add(task.name, *self.prototype_features(task))

    def prototype_features(self, task: Task) -> tuple[Tensor, Tensor, Tensor]:
        """What ``PrototypeSet.add`` makes prototypes of, under the live weights: ``train_features``
        and per class the mean text feature float32 [classes, D].
        """
        return *self.train_features(task), self._kept_text(task)

    def train_features(self, task: Task) -> tuple[Tensor, Tensor]:
        """Normalised features float32 [M, D] and labels int64 [M] of a task's training images
        (through the test transform) under the live weights."""
        train = not_empty(task.dataset("train", self.clip.test_transform), task, "train")
        return self._kept_features(train, lambda: train)

    def agnostic_accuracy(
        self, task: Task, fusion: Experts, prototypes: PrototypeSet, voting: SemanticVoting
    ) -> float:
        """Accuracy in percent on one dataset, experts by voting. For several datasets
        ``fused_rows`` is the cheaper call."""
        rows = self.fused_rows(fusion, prototypes, voting, protocols=("agnostic",), tasks=(task,))
        return rows["agnostic"].accuracy[0]

    def fused_rows(
        self,
        fusion: Experts | None,
        prototypes: PrototypeSet,
        voting: SemanticVoting,
        *,
        protocols: Sequence[Protocol] = ("task-id", "agnostic"),
        tasks: Sequence[Task] | None = None,
        own_classes: bool = False,
    ) -> dict[Protocol, Row]:
        """The row of each protocol over ``tasks`` (default: the whole benchmark), all in one pass
        over the experts. The tasks of ``prototypes`` are those learnt so far.

        Without ``fusion`` the pretrained model, which must be live, answers in the place of all
        experts. With ``own_classes`` an expert that answers a union of classes chooses among those
        of its own task (see `condu.ballots.Ballot`).

        Puts the model at θ_0 first and again at the end, also after an error. Raises ValueError for
        an unknown protocol, an empty test set, and when the tasks with prototypes are not the tasks
        with experts, or, where their classes are needed, not tasks of the benchmark.
        """
        if fusion is not None and set(prototypes.tasks) != set(fusion.tasks):
            raise ValueError(
                f"prototypes of tasks {list(prototypes.tasks)} but experts of {list(fusion.tasks)}"
            )
        experts = ExpertPass(self, fusion, prototypes, voting, own_classes)
        if fusion is not None:
            fusion.reset()
        try:
            ballots = experts.ballots(self.benchmark if tasks is None else tasks, protocols)
            experts.answer(ballot for row in ballots.values() for ballot in row)
        finally:
            if fusion is not None:
                fusion.reset()
        return {
            protocol: Row(
                [ballot.accuracy() for ballot in row],
                [ballot.first_choices(len(prototypes)) for ballot in row],
            )
            for protocol, row in ballots.items()
        }

    def logits(self, features: Tensor, tasks: Sequence[Task], heads: Heads) -> Tensor:
        """exp(logit_scale)·cosine with the text heads of ``tasks``, float32 [M, classes]; those
        that ``heads`` lacks are made under the live weights."""
        for task in tasks:
            if task.name not in heads:
                heads[task.name] = F.normalize(self._mean_text(task), dim=-1)
        scale: Any = self.clip.model.logit_scale
        head = torch.cat([heads[task.name] for task in tasks])
        return float(scale.detach().exp()) * features @ head.T

    def frozen_answers(self, task: Task) -> FrozenAnswers:
        """Answers of the pretrained model on a test set; the first call needs the model to be at
        θ_0."""
        if task.name not in self._frozen:
            test = task.dataset("test", self.clip.test_transform)
            features, labels = self._kept_features(test, lambda: self._tests[task])
            logits = self.logits(features, (task,), self._frozen_heads)
            self._frozen[task.name] = FrozenAnswers(features, labels, logits)
        return self._frozen[task.name]

    def frozen_features(self, task: Task, indices: Tensor) -> tuple[Tensor, Tensor]:
        """Normalised features float32 [M, D] of the pretrained model, and labels int64 [M], of the
        test images ``indices`` int64 [M]; needs the model to be at θ_0. Of a test set that it has
        not answered only these images are read."""
        if task.name not in self._frozen:
            return self._encode(task.dataset("test", self.clip.test_transform), indices)
        frozen = self._frozen[task.name]
        return frozen.features[indices], frozen.labels[indices]

    def frozen_logits(self, task: Task, indices: Tensor, tasks: tuple[Task, ...]) -> Tensor:
        """Logits float32 [M, classes] of the pretrained model on the test images ``indices`` int64
        [M], among the classes of ``tasks``; the first call needs the model to be at θ_0."""
        frozen = self.frozen_answers(task)
        if tasks == (task,):
            return frozen.logits[indices]
        return self.logits(frozen.features[indices], tasks, self._frozen_heads)

    def test_features(self, task: Task, indices: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Normalised features float32 [M, D] under the live weights, and labels int64 [M], of a
        task's test images: all, or those at ``indices`` int64 [M], in that order."""
        return self._encode(self._tests[task], indices)

    def _kept_features(
        self, dataset: TransformedDataset, images: Callable[[], Dataset[Any]]
    ) -> tuple[Tensor, Tensor]:
        """Features and labels of ``images``, which are those of ``dataset`` and asked for only if
        they are not kept."""
        if self.cache is None:
            return self._encode(images())
        with self._autocast():
            return self.cache.images(self.clip.model, dataset, lambda: self._encode(images()))

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

    def _mean_text(self, task: Task) -> Tensor:
        if task.name not in self._tokens:
            self._tokens[task.name] = prompt_tokens(self.clip.tokenize, task)
        with self._autocast():
            return mean_text_features(
                self.clip.model, self._tokens[task.name], batch_size=self._batch_size
            )
