"""Semantic-based voting: which experts answer for an image whose task is unknown, and how their
answers are fused.

The frozen pretrained model encodes the image once. A task is as similar as its most similar
prototype; the K most similar tasks send their experts, whose predictions are fused with weights.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, NamedTuple, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from condu.prototypes import PrototypeSet

Weights = Literal["similarity", "uniform", "softmax"]
Space = Literal["probabilities", "logits"]

PRETRAINED = -1
"""Index that stands for the pretrained model among the experts."""


class Votes(NamedTuple):
    """``experts`` int64 [B, K]: indices into ``prototypes.tasks``, most similar first; -1 (always
    the first column) is the pretrained model. ``weights`` float32 [B, K]: none negative, every row
    sums to 1.
    """

    experts: Tensor
    weights: Tensor

    @property
    def first_choices(self) -> Tensor:
        """The most similar task of each image, int64 [B]."""
        first = (self.experts != PRETRAINED).int().argmax(dim=1, keepdim=True)  # of equals, first
        return self.experts.gather(1, first).squeeze(1)


@dataclass(frozen=True)
class SemanticVoting:
    """Voting rule.

    - ``k``: experts per image; all tasks where there are fewer. Ties between tasks go to the
      earlier task.
    - ``weights``: ``"similarity"`` proportional to the cosine with the task's best prototype, where
      a negative cosine counts as 0 (and all K equally, if none is positive); ``"uniform"``;
      ``"softmax"`` of cosine / ``temperature``.
    - ``temperature``: only used by ``"softmax"``; the default is CLIP's own, 1/100.
    - ``include_pretrained``: the pretrained model always votes too. It has no prototypes, so it
      gets an equal share 1/(K+1) and the experts split the rest by ``weights``.
    - ``space``: what is averaged, ``"probabilities"`` (softmax of the logits) or ``"logits"``
      (exp(logit_scale)·cosine).

    Raises ValueError for any other value, naming the field.
    """

    k: int = 4
    weights: Weights = "similarity"
    temperature: float = 0.01
    include_pretrained: bool = False
    space: Space = "probabilities"

    def __post_init__(self) -> None:
        if isinstance(self.k, bool) or not isinstance(self.k, int) or self.k < 1:
            raise ValueError(f"k must be an integer of at least 1, got {self.k!r}")
        if self.weights not in get_args(Weights):
            raise ValueError(f"weights must be one of {get_args(Weights)}, got {self.weights!r}")
        if not (math.isfinite(self.temperature) and self.temperature > 0):
            raise ValueError(f"temperature must be positive and finite, got {self.temperature!r}")
        if self.space not in get_args(Space):
            raise ValueError(f"space must be one of {get_args(Space)}, got {self.space!r}")

    @classmethod
    def preset(cls, name: str) -> SemanticVoting:
        """``"paper"``: our reading of the paper's text, which gives neither K nor the exact weights
        (top 4, weights proportional to similarity, probabilities, experts only). ``"code"``: what
        the authors' code does (the pretrained model and the top 4, uniform mean of the logits).
        """
        if name == "paper":
            return cls()
        if name == "code":
            return cls(k=4, weights="uniform", include_pretrained=True, space="logits")
        raise ValueError(f"preset must be 'paper' or 'code', got {name!r}")

    def vote(self, features: Tensor, prototypes: PrototypeSet) -> Votes:
        """Experts and weights for frozen image features [B, D] (any scale, any float dtype).

        K columns, one more with ``include_pretrained``. Raises ValueError for features that are not
        finite or of another dimension than the prototypes, and for an empty prototype set.
        """
        return self.choose(task_similarities(features, prototypes))

    def choose(self, similarities: Tensor) -> Votes:
        """The same from the similarity of each image with each task, float32 [B, T]."""
        # topk leaves the order of equal values open; a stable sort keeps the earlier task first
        similarity, experts = similarities.sort(dim=1, descending=True, stable=True)
        similarity, experts = similarity[:, : self.k], experts[:, : self.k]
        weights = self._weigh(similarity)
        if self.include_pretrained:
            batch, chosen = experts.shape
            share = 1.0 / (chosen + 1)
            experts = torch.cat([experts.new_full((batch, 1), PRETRAINED), experts], dim=1)
            weights = torch.cat([weights.new_full((batch, 1), share), weights * (1 - share)], dim=1)
        return Votes(experts, weights)

    def scores(self, logits: Tensor) -> Tensor:
        """What one expert contributes: its logits [..., C] brought to the space in which votes are
        averaged, float32.
        """
        logits = logits.float()
        return logits.softmax(dim=-1) if self.space == "probabilities" else logits

    def fuse(self, logits: Tensor, weights: Tensor) -> Tensor:
        """Weighted mean [B, C] of the scores of K experts with logits [B, K, C] and weights [B,
        K].
        """
        if logits.dim() != 3 or logits.shape[:2] != weights.shape:
            raise ValueError(
                "logits must be [B, K, C] and weights [B, K],"
                f" got {list(logits.shape)} and {list(weights.shape)}"
            )
        return (self.scores(logits) * weights.float().unsqueeze(-1)).sum(dim=1)

    def _weigh(self, similarity: Tensor) -> Tensor:
        if self.weights == "softmax":
            return (similarity / self.temperature).softmax(dim=1)
        uniform = torch.full_like(similarity, 1.0 / similarity.shape[1])
        if self.weights == "uniform":
            return uniform
        positive = similarity.clamp(min=0)
        total = positive.sum(dim=1, keepdim=True)
        return torch.where(total > 0, positive / total, uniform)


def task_similarities(features: Tensor, prototypes: PrototypeSet) -> Tensor:
    """Cosine of each feature [B, D] with the most similar prototype of each task: float32 [B,
    T].
    """
    if not prototypes.tasks:
        raise ValueError("the prototype set is empty: there is no task to vote for")
    bank, offsets = prototypes.features()
    if features.dim() != 2 or features.shape[1] != bank.shape[1]:
        raise ValueError(
            f"features must be [B, {bank.shape[1]}] like the prototypes, got {list(features.shape)}"
        )
    if not bool(torch.isfinite(features).all()):
        bad = int((~torch.isfinite(features)).any(dim=1).nonzero()[0])
        raise ValueError(f"features of image {bad} are not finite")
    cosine = F.normalize(features.float(), dim=-1) @ bank.to(features.device).T
    tasks = cosine.split(offsets.diff().tolist(), dim=1)
    return torch.stack([of_task.amax(dim=1) for of_task in tasks], dim=1)
