"""A CLIP of transformers with a few thousand random weights, and its data."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import CLIPConfig, CLIPModel


def tiny_clip(seed: int = 0) -> CLIPModel:
    torch.manual_seed(seed)
    tower = {
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
    }
    text = {"vocab_size": 40, "max_position_embeddings": 8, "eos_token_id": 39, **tower}
    vision = {"image_size": 8, "patch_size": 4, **tower}
    model = CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=8))
    model.logit_scale.requires_grad_(False)
    return model


class Pairs(torch.utils.data.Dataset):
    """Random images with random captions: as many as asked for, the same for the same seed."""

    def __init__(self, seed: int, count: int = 8) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.images = torch.randn(count, 3, 8, 8, generator=generator)
        self.captions = torch.randint(0, 39, (count, 6), generator=generator)

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {"pixel_values": self.images[index], "input_ids": self.captions[index]}


def collate(pairs: list[dict[str, Tensor]]) -> dict[str, Any]:
    batch = {name: torch.stack([pair[name] for pair in pairs]) for name in pairs[0]}
    return {**batch, "return_loss": True}
