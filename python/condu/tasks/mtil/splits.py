"""Which images are for training where the makers of a data set did not say."""

from __future__ import annotations

import numpy as np
import torch

SPLIT_SEED = 42


def random_split(images: int) -> tuple[np.ndarray, np.ndarray]:
    """Indices of the training and of the test images of a data set that its makers did not split.

    Of a permutation drawn by ``torch.randperm`` from a generator of its own with seed 42, the first
    ⌊0.8·images⌋ are for training and the rest for testing, as ``torch.utils.data.random_split``
    has it and MTIL's public code uses it. Images count in the order of Caltech101's and EuroSAT's
    readers: classes by name, images by number or name. SUN397's reader gives them as the file
    system does, so they count in the order of their paths here, and no two copies need agree on
    the split of other programs.
    """
    order = torch.randperm(images, generator=torch.Generator().manual_seed(SPLIT_SEED)).numpy()
    cut = int(0.8 * images)
    return order[:cut], order[cut:]
