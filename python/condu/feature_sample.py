"""What the pretrained model makes of a few test images: enough for a picture of its feature space.

A safetensors file: of the task at each position, `<position>.features` float32 [n, D], normalised,
and `<position>.labels` int64 [n], the task's own.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from condu.training import task_seed
from condu.weights import save_weights

if TYPE_CHECKING:
    from condu.evaluation import Evaluator

IMAGES = 100
"""Of each data set, or all where there are fewer."""


def save_feature_sample(file: Path, evaluator: Evaluator, *, seed: int) -> None:
    """Write the features of random test images, the same ones for the same seed, under the weights
    of the evaluator's model, which must be θ_0."""
    tensors: dict[str, Tensor] = {}
    for position, task in enumerate(evaluator.benchmark):
        images = len(task.load("test"))
        generator = torch.Generator().manual_seed(task_seed(seed, f"features of {task.name}"))
        chosen = torch.randperm(images, generator=generator)[:IMAGES].sort().values
        features, labels = evaluator.frozen_features(task, chosen)
        tensors |= {f"{position}.features": features, f"{position}.labels": labels}
    save_weights(file, tensors)
