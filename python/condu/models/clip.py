"""CLIP models through open_clip."""

from __future__ import annotations

import textwrap
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import open_clip
import torch.nn.functional as F
from open_clip.transform import AugmentationCfg, image_transform
from PIL.Image import Image
from torch import Tensor, nn

from condu.config import ConfigError
from condu.evaluation import Evaluator
from condu.tasks.benchmark import Benchmark, Task, TransformedDataset

if TYPE_CHECKING:
    from condu.models.base import Autocast, Objective

# The only augmentation of MTIL's protocol: a crop of 90-100 % of the area, no flip.
AUGMENTATION = AugmentationCfg(scale=(0.9, 1.0))

# Linear layers of MLPs, as open_clip names them and as timm does, whose image towers it also has.
MLP_LAYERS = ("c_fc", "c_proj", "fc1", "fc1_g", "fc1_x", "fc2")


@dataclass(frozen=True)
class ClipModel:
    """A CLIP model and what belongs to it.

    model: ``encode_image(x, normalize=True)`` [B, D], ``encode_text(tokens, normalize=True)``
        [N, D], ``logit_scale`` (a logarithm).
    tokenize: texts to int64 [N, context length].
    train_transform, test_transform: an RGB image to float32 [3, H, W]; the first crops at random.

    To the trainer it is a `condu.models.base.LiveModel`.
    """

    frozen: ClassVar[tuple[str, ...]] = ("*logit_scale", "*logit_bias")
    votes: ClassVar[bool] = True
    task_type: ClassVar[type] = Task
    collate: ClassVar[None] = None

    name: str
    model: nn.Module
    tokenize: Callable[[Sequence[str]], Tensor]
    train_transform: Callable[[Image], Tensor]
    test_transform: Callable[[Image], Tensor]

    @property
    def lora_targets(self) -> tuple[str, ...]:
        """The layers of the MLPs in both towers. ConfigError for a tower without any, which would
        be left as it is."""
        names = [name for name, _ in self.model.named_modules()]
        towers = {
            "image": {n.rpartition(".")[2] for n in names if n.startswith("visual.")},
            "text": {n.rpartition(".")[2] for n in names if not n.startswith("visual.")},
        }
        for tower, found in towers.items():
            if not found.intersection(MLP_LAYERS):
                raise ConfigError(
                    f"lora.targets: no layer in the {tower} tower of model {self.name!r} is called "
                    f"{', '.join(MLP_LAYERS)}: name the layers that are to be adapted"
                )
        return tuple(name for name in MLP_LAYERS if any(name in found for found in towers.values()))

    def training_set(self, task: Task) -> TransformedDataset:
        """Images of the task through `train_transform`, with labels."""
        return task.dataset("train", self.train_transform)

    def objective(self, task: Task, label_smoothing: float) -> Objective:
        """Cross-entropy of exp(logit_scale)·image·textᵀ over the task's classes, text from its
        first template (ConDU, arXiv 2503.10705, and its code)."""
        prompts = self.tokenize(task.prompts)

        def loss(model: nn.Module, batch: Any) -> Tensor:
            pixels, labels = batch
            image, text, scale = model(pixels, prompts.to(pixels.device))[:3]
            return F.cross_entropy(scale * image @ text.T, labels, label_smoothing=label_smoothing)

        return loss

    def evaluator(
        self, benchmark: Benchmark, *, batch_size: int, autocast: Autocast = nullcontext
    ) -> Evaluator:
        return Evaluator(
            self,
            benchmark,
            batch_size=batch_size,
            num_workers=benchmark.workers,
            autocast=autocast,
        )

    def with_model(self, model: nn.Module) -> ClipModel:
        return replace(self, model=model)


def _load_mini() -> ClipModel:
    from condu.tasks.mini.model import (
        MEAN,
        STD,
        WEIGHTS,
        MiniTokenizer,
        build_model,
        load_weights,
        model_config,
    )

    model = build_model()
    load_weights(model, WEIGHTS)
    size = model_config()["vision_cfg"]["image_size"]
    mean, std = (MEAN,) * 3, (STD,) * 3
    return ClipModel(
        name="mini",
        model=model.eval(),
        tokenize=MiniTokenizer(),
        train_transform=image_transform(size, True, mean, std, aug_cfg=AUGMENTATION),
        test_transform=image_transform(size, False, mean, std),
    )


def load_clip(name: str, pretrained: str | None = None) -> ClipModel:
    """The model called ``name``, in eval mode, fp32, on the CPU.

    ``"mini"`` is the model shipped with condu.tasks.mini and takes no ``pretrained``. Any other
    name is one of open_clip's, with ``pretrained`` a tag that open_clip knows or a local file;
    None gives random weights. Raises ValueError for an unknown name or tag, for a file that holds
    no weights of this model, weights that cannot be fetched, and such as were trained with another
    activation than the model has.
    """
    if name == "mini":
        if pretrained is not None:
            raise ValueError(f"model 'mini' ships its weights, got pretrained={pretrained!r}")
        return _load_mini()
    if name not in open_clip.list_models():
        raise ValueError(f"unknown model {name!r}: neither 'mini' nor a model of open_clip")
    tags = open_clip.list_pretrained_tags_by_model(name)
    if pretrained is not None and pretrained not in tags and not Path(pretrained).is_file():
        raise ValueError(
            f"unknown weights {pretrained!r} for model {name!r}: neither a file nor one of {tags}"
        )
    if pretrained is not None and pretrained in tags:
        _check_activation(name, pretrained)
    try:
        model, train_transform, test_transform = open_clip.create_model_and_transforms(
            name, pretrained, aug_cfg=AUGMENTATION
        )
    except Exception as error:  # a file that is no checkpoint raises anything from KeyError on
        if pretrained is None:
            raise
        raise ValueError(_without_weights(name, pretrained, error)) from error
    return ClipModel(
        name=name,
        model=model.eval(),
        tokenize=open_clip.get_tokenizer(name),
        train_transform=train_transform,
        test_transform=test_transform,
    )


def _without_weights(name: str, pretrained: str, error: Exception) -> str:
    reason = textwrap.shorten(f"{type(error).__name__}: {error}", 160, placeholder=" …")
    if Path(pretrained).is_file():
        return f"{pretrained!r} holds no weights of model {name!r}: {reason}"
    source = open_clip.get_pretrained_cfg(name, pretrained)
    hub = source.get("hf_hub", "").strip("/")
    return (
        f"weights {pretrained!r} of model {name!r} could not be fetched ({reason}): without a "
        f"network give a file as pretrained, from {hub or source.get('url')}"
    )


def _check_activation(name: str, tag: str) -> None:
    """open_clip only warns, and then answers some points worse."""
    has = bool(open_clip.get_model_config(name).get("quick_gelu"))
    needs = bool(open_clip.get_pretrained_cfg(name, tag).get("quick_gelu"))
    if has != needs:
        other = f"{name}-quickgelu" if needs else name.removesuffix("-quickgelu")
        raise ValueError(
            f"weights {tag!r} were trained with{'' if needs else 'out'} QuickGELU, which model "
            f"{name!r} has{' not' if needs else ''}: take model {other!r}"
        )
