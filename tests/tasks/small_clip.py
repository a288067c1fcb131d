"""A CLIP model of 16 pixels that reads open_clip's prompts."""

from __future__ import annotations

import open_clip
import torch
from open_clip.model import CLIP
from open_clip.transform import image_transform

from condu.models.clip import AUGMENTATION, ClipModel


def small_clip(name: str, pretrained: str | None) -> ClipModel:
    """open_clip's tokenizer and transforms round a model of 16 pixels."""
    torch.manual_seed(0)
    tower = {"width": 32, "layers": 1}
    vision = {"image_size": 16, "patch_size": 8, "head_width": 16, **tower}
    text = {"context_length": 32, "vocab_size": 49408, "heads": 2, **tower}
    mean, std = (0.5,) * 3, (0.5,) * 3
    return ClipModel(
        name,
        CLIP(16, vision, text),
        open_clip.get_tokenizer("ViT-B-32", context_length=32),
        image_transform(16, True, mean, std, aug_cfg=AUGMENTATION),
        image_transform(16, False, mean, std),
    )
