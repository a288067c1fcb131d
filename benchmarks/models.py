"""Models to measure on: the shapes of real checkpoints with random weights."""

from __future__ import annotations

import open_clip
import torch
from torch import Tensor


def pretrained_weights(name: str = "ViT-B-16") -> dict[str, Tensor]:
    """Parameters of an open_clip model by name, randomly initialised."""
    model = open_clip.create_model(name, pretrained=None)
    return {key: value.detach().clone() for key, value in model.named_parameters()}


def finetuned_weights(pretrained: dict[str, Tensor], seed: int) -> dict[str, Tensor]:
    """The base plus noise of about 1e-3, as fine-tuning leaves it."""
    generator = torch.Generator().manual_seed(seed)
    return {
        name: value + 1e-3 * torch.randn(value.shape, generator=generator)
        for name, value in pretrained.items()
    }
