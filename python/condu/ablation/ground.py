"""What variants have in common: θ_0, what depends on it alone, and the fine-tuned models."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from functools import cached_property
from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor

from condu.ablation.experts import AblatedExperts
from condu.ablation.fusing import Fusing
from condu.ablation.variants import PrototypeKind
from condu.evaluation import Evaluator
from condu.features import encode_images, mean_text_features, prompt_tokens
from condu.fusion import ConDU
from condu.prototypes import PrototypeSet

if TYPE_CHECKING:
    from condu.models.clip import ClipModel
    from condu.tasks.benchmark import Benchmark, Task
    from condu.tuning import Trained
    from condu.workspace import Workspace


class Ground:
    """A live CLIP model at θ_0, which it holds again after every call. With ``half`` it is one that
    came out of a checkpoint in bfloat16, and so are the fine-tuned ``models``."""

    def __init__(
        self, workspace: Workspace, models: Sequence[Trained], *, half: bool = False
    ) -> None:
        config = workspace.config
        self.models = models
        self.half = half
        self.benchmark: Benchmark = workspace.benchmark
        self.scorer = cast(Evaluator, workspace.tuner("full").scorer)
        self.clip: ClipModel = self.scorer.clip
        self._workspace = workspace
        if half:
            self.clip = self.clip.with_model(copy.deepcopy(self.clip.model))
            with torch.no_grad():
                for tensor in self.clip.model.state_dict().values():
                    tensor.copy_(_rounded(tensor))
            self.scorer = self.scorer.anew(self.clip)
        self._fusion = ConDU(
            self.clip.model,
            rule=config.fusion.rule(),
            state_dtype=getattr(torch, config.fusion.state_dtype),
        )
        self._sets: dict[PrototypeKind, PrototypeSet] = {}

    def experts(self, fusing: Fusing) -> AblatedExperts:
        """Nobody yet; to be given the fine-tuned models one after the other."""
        return AblatedExperts(self._fusion, fusing, seed=self._workspace.config.seed)

    def finetuned(self, index: int) -> dict[str, Tensor]:
        """The fine-tuned model of task ``index``."""
        weights = self.models[index].load()
        return {n: _rounded(t) for n, t in weights.items()} if self.half else weights

    def prototypes(self, kind: PrototypeKind, tasks: int) -> PrototypeSet:
        """Prototypes of the first so many tasks, of one of the kinds that the pretrained model
        makes."""
        if kind not in self._sets:
            self._fusion.reset()
            self._sets[kind] = PrototypeSet()
            for task in self.benchmark:
                self._add(self._sets[kind], task, kind)
        return self._sets[kind].first(tasks)

    def _add(self, prototypes: PrototypeSet, task: Task, kind: PrototypeKind) -> None:
        images, labels, text = self._features[task.name]
        # features of length 0 leave the direction to the others
        if kind == "images":
            text = torch.zeros_like(text)
        elif kind == "text":
            images = torch.zeros_like(images)
        elif kind == "unnormalised":
            text = self._unnormalised(task)
            images = torch.zeros_like(images)
        prototypes.add(task.name, images, labels, text)

    @cached_property
    def _features(self) -> dict[str, tuple[Tensor, Tensor, Tensor]]:
        return {task.name: self.scorer.prototype_features(task) for task in self.benchmark}

    def _unnormalised(self, task: Task) -> Tensor:
        """f(y, θ_0) + mean_m f(x_m, θ_0) of each class, float32 [classes, D]."""
        size = self._workspace.config.evaluation.batch_size
        with self._workspace.accelerator.autocast():
            images, labels = encode_images(
                self.clip.model,
                task.dataset("train", self.clip.test_transform),
                batch_size=size,
                num_workers=self.benchmark.workers,
                normalised=False,
            )
            tokens = prompt_tokens(self.clip.tokenize, task)
            text = mean_text_features(self.clip.model, tokens, batch_size=size, normalised=False)
        sums = torch.zeros(text.shape, dtype=torch.float64).index_add_(0, labels, images.double())
        counts = torch.bincount(labels, minlength=len(text)).unsqueeze(1)
        return (sums / counts).float() + text


def _rounded(tensor: Tensor) -> Tensor:
    """As it comes out of a checkpoint in bfloat16."""
    return tensor.to(torch.bfloat16).to(tensor.dtype) if tensor.is_floating_point() else tensor
