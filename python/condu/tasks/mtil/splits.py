"""Which images are for training: MTIL's own split, and few-shot subsets."""

from __future__ import annotations

import zlib

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


def few_shot(labels: np.ndarray, shots: int, *, seed: int, name: str) -> np.ndarray:
    """Ascending indices of ``shots`` images of each class, or of all where a class has fewer (as
    Flowers102, with 10). Drawn without replacement by a generator that depends on ``seed`` and
    the data set's ``name`` only, so no order of tasks changes it."""
    rng = np.random.default_rng([seed, zlib.crc32(name.encode())])
    chosen = [
        rng.permutation(np.flatnonzero(labels == label))[:shots] for label in np.unique(labels)
    ]
    return np.sort(np.concatenate(chosen))
