"""CLIP models through open_clip."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import open_clip
from open_clip.transform import AugmentationCfg, image_transform
from PIL.Image import Image
from torch import Tensor, nn

# The only augmentation of MTIL's protocol: a crop of 90-100 % of the area, no flip.
AUGMENTATION = AugmentationCfg(scale=(0.9, 1.0))


@dataclass(frozen=True)
class ClipModel:
    """A CLIP model and what belongs to it.

    model: ``encode_image(x, normalize=True)`` [B, D], ``encode_text(tokens, normalize=True)``
        [N, D], ``logit_scale`` (a logarithm).
    tokenize: texts to int64 [N, context length].
    train_transform, test_transform: an RGB image to float32 [3, H, W]; the first crops at random.
    """

    name: str
    model: nn.Module
    tokenize: Callable[[Sequence[str]], Tensor]
    train_transform: Callable[[Image], Tensor]
    test_transform: Callable[[Image], Tensor]


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
    None gives random weights. Raises ValueError for an unknown name or tag.
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
    model, train_transform, test_transform = open_clip.create_model_and_transforms(
        name, pretrained, aug_cfg=AUGMENTATION
    )
    return ClipModel(
        name=name,
        model=model.eval(),
        tokenize=open_clip.get_tokenizer(name),
        train_transform=train_transform,
        test_transform=test_transform,
    )
