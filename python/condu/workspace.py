"""What the methods of a run share: the live model, its fine-tunings, prototypes, scores at θ_0."""

from __future__ import annotations

import copy
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from torch import nn

from condu.evaluation import Evaluator
from condu.feature_cache import FeatureCache
from condu.progress import RunProgress
from condu.prototypes import PrototypeSet
from condu.tracking import Tracking
from condu.training import train_all_weights
from condu.tuning import Tuner

if TYPE_CHECKING:
    from accelerate import Accelerator

    from condu.config import RunConfig
    from condu.fusion import ConDU
    from condu.models.base import LiveModel, Scorer
    from condu.tasks.benchmark import Benchmark, Task

Tuning = Literal["full", "lora", "pam"]
"""What a method fine-tunes: all weights, or adapters of the rank in the section `lora` or `pam`."""


class Workspace:
    """Shared by all methods of a run. `live.model` holds θ_0 whenever nobody is using it."""

    def __init__(
        self,
        live: LiveModel,
        benchmark: Benchmark,
        config: RunConfig,
        folder: Path,
        accelerator: Accelerator,
        progress: RunProgress,
    ) -> None:
        self.live = live
        self.benchmark = benchmark
        self.config = config
        self.folder = folder
        self.accelerator = accelerator
        self.progress = progress
        self.tracking = Tracking(accelerator)
        live.model.to(accelerator.device).eval()
        self._zero_shot: dict[int, float] = {}
        self._adapted: dict[int, Tuner] = {}

    def tuner(self, tuning: Tuning) -> Tuner:
        """The one tuner of a kind; methods whose adapters have the same rank share theirs."""
        if tuning == "full":
            return self._full
        rank = self.config.lora.rank if tuning == "lora" else self.config.pam.rank
        if rank not in self._adapted:
            self._adapted[rank] = self._adapters(rank)
        return self._adapted[rank]

    @cached_property
    def scorer(self) -> Scorer:
        """Of the live model; made at first use, for only the main process evaluates."""
        settings = self.config.evaluation
        scorer = self.live.evaluator(
            self.benchmark, batch_size=settings.batch_size, autocast=self.accelerator.autocast
        )
        if isinstance(scorer, Evaluator):
            scorer.progress = self.progress
            if settings.cache is not None:
                scorer.cache = FeatureCache(settings.cache)
        return scorer

    @cached_property
    def prototypes(self) -> PrototypeSet:
        """Of the tasks learnt so far, by any method: they depend on θ_0 alone."""
        file = self._prototype_file
        return PrototypeSet.load(file) if file.exists() else PrototypeSet()

    def add_prototypes(self, task: Task, fusion: ConDU | None = None) -> None:
        """Add a task's prototypes, unless another method has; of the model of ``fusion`` at θ_0, or
        of the live one, which is there."""
        if task.name not in self.prototypes:
            assert isinstance(self.scorer, Evaluator)  # of a model that votes
            self.scorer.add_prototypes(self.prototypes, task, fusion)
            self.prototypes.save(self._prototype_file)

    def zero_shot_accuracy(self, index: int) -> float:
        """Accuracy (percent) of θ_0 on the data set of task `index`, measured once."""
        task = self.benchmark.tasks[index]
        if isinstance(self.scorer, Evaluator):
            return self.scorer.frozen_answers(task).accuracy()
        if index not in self._zero_shot:
            self._zero_shot[index] = self.scorer.accuracy(task)
        return self._zero_shot[index]

    @cached_property
    def _full(self) -> Tuner:
        train_all_weights(self.live)
        return Tuner(
            self.live,
            self.config.training,
            self,
            self.folder / "finetuned",
            names=frozenset(self.live.model.state_dict()),
        )

    @property
    def _prototype_file(self) -> Path:
        return self.folder / "prototypes.safetensors"

    def _adapters(self, rank: int) -> Tuner:
        from condu.models.lora import add_lora, rewritten_weights

        lora = self.config.lora
        model = add_lora(
            _over_the_same_memory(self.live.model),
            rank=rank,
            targets=lora.targets or self.live.lora_targets,
            seed=self.config.seed,
        )
        trainable = {name for name, p in model.named_parameters() if p.requires_grad}
        buffers = {name for name, _ in model.named_buffers()}  # BatchNorm's statistics move too
        return Tuner(
            self.live.with_model(model.to(self.accelerator.device).eval()),
            lora.training(self.config.training),
            self,
            self.folder / f"lora-{rank}",
            names=frozenset(trainable | (buffers & model.state_dict().keys())),
            spoilt=frozenset(rewritten_weights(model)),
        )


def _over_the_same_memory(model: nn.Module) -> nn.Module:
    """A copy whose parameters are others (frozen or not by themselves) but share their memory."""
    parameters = {id(p): nn.Parameter(p.detach(), requires_grad=False) for p in model.parameters()}
    return copy.deepcopy(model, parameters)
