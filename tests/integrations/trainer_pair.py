"""The Hugging Face Trainer, for each of two processes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from states import contents
from tiny_clip import absorbed_by_hand, tiny_clip, trainer

from condu.integrations.transformers import ConDUCallback

TASKS = ("cars", "food")


def train(folder: Path) -> dict[str, Any]:
    """Two tasks, absorbed by the callback and by hand."""
    model = tiny_clip(seed=torch.distributed.get_rank())  # the first process's weights count
    fusion = None
    for seed, task in enumerate(TASKS):
        callback = ConDUCallback(task, fusion)
        run = trainer(model, folder, seed, callback)
        run.train()
        fusion = callback.fusion
    return {
        "callback": contents(fusion.state),
        "by hand": absorbed_by_hand(tiny_clip(), folder, *TASKS),
        "wrapper": type(run.model_wrapped).__name__,
    }
