"""Test images kept as pixels give a model the very inputs that the whole transform gives."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from open_clip.transform import image_transform
from PIL import Image
from torch import Tensor
from torch.utils.data import TensorDataset
from torchvision.transforms import CenterCrop, Compose, PILToTensor, ToTensor

from condu.decoded import DecodedTests
from condu.tasks.benchmark import Task

MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
CLIP = image_transform(24, False, MEAN, STD)
COUNT, PIXELS = 6, 3 * 24 * 24


def image(number: int) -> Image.Image:
    """Of every value a pixel can have; sizes and modes differ."""
    generator = np.random.default_rng(number)
    size = (30 + number, 41 - 2 * number)
    channels = ((3,), (), (4,))[number % 3]  # RGB, grey, RGBA
    return Image.fromarray(generator.integers(0, 256, (*size, *channels), dtype=np.uint8))


def task(name: str = "noise") -> Task:
    images: Any = [(image(number), number % 2) for number in range(COUNT)]
    return Task(name, ("odd", "even"), ("a {}.",), lambda split: images)


def as_rgb(image: Image.Image) -> Image.Image:
    return image.convert("RGB")


def only_pixels(image: Image.Image) -> Tensor:
    return PILToTensor()(as_rgb(image).resize((8, 8))).float()


@pytest.mark.parametrize("cache_bytes", [0, COUNT * PIXELS - 1, COUNT * PIXELS])
@pytest.mark.parametrize("num_workers", [0, 1])
def test_pixels_are_kept_and_finished_as_the_transform_does(
    cache_bytes: int, num_workers: int
) -> None:
    tests = DecodedTests(CLIP, cache_bytes=cache_bytes, num_workers=num_workers)
    found = tests[task()]
    assert isinstance(found.source, TensorDataset) == (cache_bytes == COUNT * PIXELS)
    assert len(found) == COUNT
    pixels, labels = zip(*(found[index] for index in range(COUNT)), strict=True)
    assert {tensor.dtype for tensor in pixels} == {torch.uint8}
    assert [int(label) for label in labels] == [0, 1] * (COUNT // 2)
    expected = torch.stack([CLIP(image(number)) for number in range(COUNT)])
    assert torch.equal(found.finish(torch.stack(pixels)), expected)


@pytest.mark.parametrize(
    "transform",
    [only_pixels, Compose([CenterCrop(20), lambda image: image.convert("RGB"), ToTensor()])],
)
def test_another_transform_is_done_whole(transform: Callable[[Any], Tensor]) -> None:
    found = DecodedTests(transform, cache_bytes=1 << 20, num_workers=0)[task()]
    images = torch.stack([found[index][0] for index in range(COUNT)])
    assert torch.equal(
        found.finish(images), torch.stack([transform(image(n)) for n in range(COUNT)])
    )


def test_a_quarter_of_what_is_available_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    available = 4 * COUNT * PIXELS
    monkeypatch.setattr("condu.decoded.available_memory", lambda device: available)
    tests = DecodedTests(CLIP, cache_bytes=None, num_workers=0)
    available = 0  # what is kept shall not shrink the share
    assert isinstance(tests[task("first")].source, TensorDataset)
    assert not isinstance(tests[task("second")].source, TensorDataset)
    assert isinstance(tests[task("first")].source, TensorDataset)
