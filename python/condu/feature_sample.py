"""What the pretrained model makes of a few test images: enough for a picture of its feature space.

A safetensors file: of the task at each position, `<position>.features` float32 [n, D], normalised,
and `<position>.labels` int64 [n], the task's own.
"""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from condu.features import encode_images
from condu.training import task_seed
from condu.weights import save_weights

if TYPE_CHECKING:
    from condu.models.base import Autocast
    from condu.models.clip import ClipModel
    from condu.tasks.benchmark import Benchmark

IMAGES = 100
"""Of each data set, or all where there are fewer."""


def save_feature_sample(
    file: Path,
    clip: ClipModel,
    benchmark: Benchmark,
    *,
    seed: int,
    autocast: Autocast = nullcontext,
) -> None:
    """Write the features of random test images, the same ones for the same seed, under the live
    weights, which must be θ_0."""
    tensors: dict[str, Tensor] = {}
    for position, task in enumerate(benchmark):
        test = task.dataset("test", clip.test_transform)
        generator = torch.Generator().manual_seed(task_seed(seed, f"features of {task.name}"))
        chosen = torch.randperm(len(test), generator=generator)[:IMAGES].sort().values
        with autocast():
            features, labels = encode_images(
                clip.model, test, chosen, num_workers=benchmark.workers
            )
        tensors |= {f"{position}.features": features, f"{position}.labels": labels}
    save_weights(file, tensors)
