"""The embedded benchmark: small images rendered from a seed, and a small CLIP to go with them."""

from __future__ import annotations

import zlib
from functools import cache, partial

import numpy as np
from PIL import Image
from torch.utils.data import Dataset

from condu.tasks.benchmark import Benchmark, Task
from condu.tasks.mini import draw
from condu.tasks.mini.concepts import NUMBERS
from condu.tasks.mini.domains import DIGIT_TEMPLATES, DOMAINS, Domain
from condu.tasks.mini.reference import mini_reference

_DIGITS_TEST = 0.2  # share of each handwritten digit that is held out


class ImageDataset(Dataset[tuple[Image.Image, int]]):
    """uint8 images [N, H, W, 3] and int labels [N], as (RGB image, int)."""

    def __init__(self, images: np.ndarray, labels: np.ndarray) -> None:
        self.images = images
        self.labels = labels

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        return Image.fromarray(self.images[index]), int(self.labels[index])


def _generator(seed: int, name: str, split: str) -> np.random.Generator:
    """A random stream of its own for each task and split."""
    return np.random.default_rng([seed, zlib.crc32(f"{name}/{split}".encode())])


@cache
def _render(domain: Domain, seed: int, split: str) -> ImageDataset:
    rng = _generator(seed, domain.name, split)
    per_class = domain.train if split == "train" else domain.test
    labels = np.repeat(np.arange(len(domain.classnames)), per_class)
    return ImageDataset(draw.finish(rng, domain.look(rng, labels), noise=0.06), labels)


@cache
def _handwritten(seed: int, split: str) -> ImageDataset:
    from sklearn.datasets import load_digits

    digits = load_digits()
    rng = _generator(seed, "digits", "split")
    chosen: list[int] = []
    for label in range(10):
        members = rng.permutation(np.flatnonzero(digits.target == label))
        cut = round(len(members) * _DIGITS_TEST)
        chosen += sorted(members[:cut] if split == "test" else members[cut:])
    scans = (digits.images[chosen] * (255 / 16)).round().astype(np.uint8)
    side = (draw.SIZE, draw.SIZE)
    images = [
        Image.fromarray(scan).resize(side, Image.Resampling.BICUBIC).convert("RGB")
        for scan in scans
    ]
    return ImageDataset(np.stack([np.asarray(image) for image in images]), digits.target[chosen])


def mini_benchmark(seed: int = 0) -> Benchmark:
    """Seven tasks of 8 to 26 classes, about 1200 training and 300 test images each.

    ``seed`` decides every rendered pixel and the split of the handwritten digits. Images are
    kept in memory once rendered. The reference set is that of `condu.tasks.mini.reference`.
    """
    tasks = [Task(d.name, d.classnames, d.templates, partial(_render, d, seed)) for d in DOMAINS]
    tasks.append(Task("digits", NUMBERS, DIGIT_TEMPLATES, partial(_handwritten, seed)))
    return Benchmark("mini", tuple(tasks), partial(mini_reference, seed))
