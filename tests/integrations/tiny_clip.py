"""A CLIP of transformers with a few thousand random weights, its data and its trainers."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from states import contents
from torch import Tensor, nn
from transformers import CLIPConfig, CLIPModel, Trainer, TrainerCallback, TrainingArguments

from condu import ConDU


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


def trainer(
    model: nn.Module | None,
    folder: Path,
    seed: int,
    *callbacks: TrainerCallback,
    model_init: Callable[[], nn.Module] | None = None,
    **arguments: Any,
) -> Trainer:
    options = {
        "max_steps": 3,
        "learning_rate": 1e-2,
        "per_device_train_batch_size": 4,
        "save_strategy": "no",
        "report_to": [],
        "disable_tqdm": True,
        "use_cpu": True,
        "remove_unused_columns": False,
        "seed": seed,
        **arguments,
    }
    return Trainer(
        model,
        TrainingArguments(str(folder), **options),
        data_collator=collate,
        train_dataset=Pairs(seed),
        eval_dataset=Pairs(100),
        callbacks=list(callbacks),
        model_init=model_init,
    )


def absorbed_by_hand(
    model: nn.Module, folder: Path, *tasks: str, **arguments: Any
) -> dict[str, Any]:
    """The same trainings, and a call of absorb after each."""
    fusion = ConDU(model)
    for seed, task in enumerate(tasks):
        trainer(model, folder, seed, **arguments).train()
        assert fusion.moved()
        fusion.absorb(task)
    return contents(fusion.state)
