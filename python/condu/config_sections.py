"""The sections of a configuration, each with its defaults and what it refuses.

The defaults are the settings of ConDU for CLIP ViT-B/16 (arXiv 2503.10705), and for other methods
those of their papers.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationInfo, field_validator, model_validator

from condu.tasks.mtil import ORDERS
from condu.voting import SemanticVoting
from condu_ext import FusionRule

ON_DISK = ("mtil", "folders")
"""Benchmarks whose images are in files."""


class Section(BaseModel):
    """Unknown keys, NaN and infinities are refused; nothing can be changed afterwards."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class BenchmarkConfig(Section):
    """Which tasks, in which order: `order` names some or all, and `tasks` keeps the first n.

    For `mtil` and `folders`, whose images are on disk: `root`, the folder of the data sets;
    `shots`, training images of each class (None: all), drawn with `seed`; `workers`, processes
    that decode (None: 4), whose number changes the random crops. For `mtil` also `download`,
    whether to fetch what is missing; its `order` may be I or II too, and is then read as that list.
    """

    name: str = "mini"
    seed: int = Field(default=0, ge=0)
    order: tuple[str, ...] | None = Field(default=None, min_length=1)
    tasks: int | None = Field(default=None, ge=1)
    root: str | None = None
    shots: Literal[5, 16] | None = None
    download: bool = False
    workers: int | None = Field(default=None, ge=0)

    @field_validator("order", mode="before")
    @classmethod
    def _named_order(cls, value: object, info: ValidationInfo) -> object:
        if not isinstance(value, str):
            return value
        if info.data.get("name") != "mtil" or value not in ORDERS:
            raise ValueError(f"must be a list of task names, or for mtil I or II, got {value!r}")
        return ORDERS[value]

    @model_validator(mode="after")
    def _where_images_are(self) -> BenchmarkConfig:
        if self.name in ON_DISK and self.root is None:
            raise ValueError(f"{self.name!r} needs root, the folder of its data sets")
        for key, which in (
            ("root", ON_DISK),
            ("shots", ON_DISK),
            ("workers", ON_DISK),
            ("download", ("mtil",)),
        ):
            given = getattr(self, key)
            if self.name not in which and given != type(self).model_fields[key].default:
                only = " and ".join(repr(name) for name in which)
                raise ValueError(f"{key} is for {only} only, got {given!r} for {self.name!r}")
        return self


class ModelConfig(Section):
    """An open_clip model: `mini` is the one that comes with the package; `pretrained` is a tag of
    open_clip's or a local file."""

    name: str = "mini"
    pretrained: str | None = None


def _positive_rates(rates: dict[str, float]) -> dict[str, float]:
    for task, rate in rates.items():
        if rate <= 0:
            raise ValueError(f"task {task!r}: must be greater than 0, got {rate}")
    return rates


class TrainingConfig(Section):
    """Fine-tuning of one task: AdamW, linear warm-up over the share `warmup` of the steps, then
    cosine to 0."""

    steps: int = Field(default=1000, ge=1)
    batch_size: int = Field(default=64, ge=1)
    lr: float = Field(default=1e-5, gt=0)
    task_lr: dict[str, float] = Field(default_factory=dict)
    warmup: float = Field(default=0.1, ge=0, lt=1)
    label_smoothing: float = Field(default=0.2, ge=0, lt=1)
    weight_decay: float = Field(default=0.0, ge=0)
    betas: tuple[float, float] = (0.9, 0.999)

    _positive = field_validator("task_lr")(_positive_rates)

    @field_validator("betas")
    @classmethod
    def _below_one(cls, betas: tuple[float, float]) -> tuple[float, float]:
        if not all(0 <= beta < 1 for beta in betas):
            raise ValueError(f"each must be at least 0 and less than 1, got {list(betas)}")
        return betas

    def learning_rate_of(self, task: str) -> float:
        """The peak learning rate for a task: its own from `task_lr`, else `lr`."""
        return self.task_lr.get(task, self.lr)


class LoraConfig(Section):
    """Low-rank adapters: `rank` is that of `condu_lora` and `individual_lora`; the learning rates,
    `steps` (None: those of `training`) and `targets` (last parts of module names; None: the
    model's own choice) are those of all methods with adapters."""

    rank: int = Field(default=64, ge=1)
    targets: tuple[str, ...] | None = Field(default=None, min_length=1)
    lr: float = Field(default=1e-3, gt=0)
    task_lr: dict[str, float] = Field(default_factory=dict)
    steps: int | None = Field(default=None, ge=1)

    _positive = field_validator("task_lr")(_positive_rates)

    def training(self, full: TrainingConfig) -> TrainingConfig:
        """Fine-tuning of adapters: as that of all weights where nothing else is said here."""
        return full.model_copy(
            update={"lr": self.lr, "task_lr": self.task_lr, "steps": self.steps or full.steps}
        )


class PamConfig(Section):
    """Aligned merging, see `condu.pam.AlignedMerging`; `rank` is also that of `lora_average` and
    `sequential_lora`."""

    rank: int = Field(default=32, ge=1)
    top: float = Field(default=0.5, gt=0, le=1)
    period: int = Field(default=10, ge=1)
    to: Literal["zero", "global"] = "zero"
    scope: Literal["tensor", "global"] = "tensor"
    average: Literal["half", "mean"] = "half"
    reset_optimizer: bool = True


class WiseFtConfig(Section):
    """`weight`: the share of the fine-tuned weights; the rest is what they started from."""

    weight: float = Field(default=0.8, ge=0, le=1)


class LwfConfig(Section):
    """`temperature` of the distillation."""

    temperature: float = Field(default=2.0, gt=0)


class ZsclConfig(Section):
    """`images`: a folder of reference images, at any depth; `captions`: a text file with one a
    line, what follows a tab being left out, or a folder of such files. Without both, the reference
    set that comes with the benchmark. `batch_size`: reference images a step; `l2`: factor of the
    squared distance from where the task started; `average_every`: steps between weights that go
    into the average."""

    images: Path | None = None
    captions: Path | None = None
    batch_size: int = Field(default=64, ge=1)
    temperature: float = Field(default=2.0, gt=0)
    l2: float = Field(default=1.0, ge=0)
    average_every: int = Field(default=100, ge=1)

    @model_validator(mode="after")
    def _both_or_neither(self) -> ZsclConfig:
        if (self.images is None) != (self.captions is None):
            given, missing = ("images", "captions") if self.images else ("captions", "images")
            raise ValueError(f"{given} is given but {missing} is not: both or neither")
        return self


class RailConfig(Section):
    """`hidden`, `ridge`: width and regularisation of `rail_primal`; `gamma`, `kernel_ridge`: those
    of the Gaussian kernel and of `rail_dual`; `weight`: the share of the adapter's answer."""

    hidden: int = Field(default=15000, ge=1)
    ridge: float = Field(default=0.1, gt=0)
    gamma: float = Field(default=0.1, gt=0)
    kernel_ridge: float = Field(default=1e-3, gt=0)
    weight: float = Field(default=0.8, ge=0, le=1)


class TaskArithmeticConfig(Section):
    """`scale`: the factor λ of the sum of all delta models."""

    scale: float = Field(default=0.3, gt=0)


class DpeclipIdConfig(Section):
    """`answers`: who answers for the task that the prototypes name, its expert or the pretrained
    model."""

    answers: Literal["experts", "zero_shot"] = "experts"


class FusionConfig(Section):
    """How delta models are unified, see `condu_ext.FusionRule`, and the unified model's dtype."""

    zero_sum: Literal["negative", "positive", "zero"] = "negative"
    rescale: Literal["global", "tensor_mean", "per_tensor"] = "global"
    state_dtype: Literal["float32", "bfloat16"] = "float32"

    def rule(self) -> FusionRule:
        return FusionRule(zero_sum=self.zero_sum, rescale=self.rescale)


class VotingConfig(Section):
    """A preset of `condu.voting.SemanticVoting`; each field that is given replaces the preset's."""

    preset: Literal["paper", "code"] = "paper"
    k: int | None = Field(default=None, ge=1)
    weights: Literal["similarity", "uniform", "softmax"] | None = None
    temperature: float | None = Field(default=None, gt=0)
    include_pretrained: bool | None = None
    space: Literal["probabilities", "logits"] | None = None

    def voting(self) -> SemanticVoting:
        given = self.model_dump(exclude={"preset"}, exclude_none=True)
        return dataclasses.replace(SemanticVoting.preset(self.preset), **given)


class EvaluationConfig(Section):
    """`cache`: a folder in which features of the pretrained model are kept for other runs, those of
    prompts and of images on disk."""

    batch_size: int = Field(default=256, ge=1)
    cache: str | None = None
