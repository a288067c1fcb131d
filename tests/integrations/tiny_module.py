"""A LightningModule of a few hundred weights with BatchNorm, and trainers that take no time."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from states import contents
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from condu import ConDU


class TinyModule(LightningModule):
    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.lr = 1e-2
        self.net = nn.Sequential(nn.Linear(6, 33), nn.BatchNorm1d(33), nn.ReLU(), nn.Linear(33, 3))

    def training_step(self, batch: tuple[Tensor, Tensor], index: int) -> Tensor:
        inputs, labels = batch
        return nn.functional.cross_entropy(self.net(inputs), labels)

    def validation_step(self, batch: tuple[Tensor, Tensor], index: int) -> None:
        self.log("loss", self.training_step(batch, index))

    test_step = validation_step

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=self.lr)


def batches(seed: int) -> DataLoader[Any]:
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.randn(16, 6, generator=generator)
    labels = torch.randint(0, 3, (16,), generator=generator)
    return DataLoader(TensorDataset(inputs, labels), batch_size=4)


def tiny_trainer(folder: Path, *callbacks: Callback, **options: Any) -> Trainer:
    return Trainer(
        **{
            "accelerator": "cpu",
            "max_epochs": 1,
            "default_root_dir": folder,
            "logger": False,
            "enable_progress_bar": False,
            "enable_model_summary": False,
            "enable_checkpointing": False,
            "callbacks": list(callbacks),
            **options,
        }
    )


class Fail(Callback):
    """Raises when ``step`` steps are done."""

    def __init__(self, error: type[BaseException], step: int = 2) -> None:
        self.error, self.step = error, step

    def on_train_batch_end(self, trainer: Any, *args: Any) -> None:
        if trainer.global_step == self.step:
            raise self.error("as planned")


def absorbed_by_hand(folder: Path, *tasks: str, **options: Any) -> dict[str, Any]:
    """The same trainings, and a call of absorb after each."""
    module = TinyModule()
    fusion = ConDU(module)
    for seed, task in enumerate(tasks):
        tiny_trainer(folder, **options).fit(module, batches(seed), batches(100))
        assert fusion.moved()
        fusion.absorb(task)
    return contents(fusion.state)
