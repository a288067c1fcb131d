"""What is found of a data set on disk, and what is wrong with it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from PIL import Image

from condu.tasks.images import Images

State = Literal["complete", "missing", "damaged", "incomplete"]


@dataclass(frozen=True)
class Sizes:
    """What a data set has: classes, and images for training and for testing."""

    classes: int
    train: int
    test: int

    def __str__(self) -> str:
        return f"{self.classes} classes, {self.train} training and {self.test} test images"


@dataclass(frozen=True)
class Finding:
    """One data set. ``missing``: files that it needs are not there; ``damaged``: what is there
    cannot be read; ``incomplete``: it can, but is not what it should be. `expected` is None where
    any size will do, `found` where nothing could be counted. `problems` is empty for what is
    complete. `how`: what has to be done. `downloads`: whether `benchmark.download` can do that.
    """

    name: str
    state: State
    expected: Sizes | None
    found: Sizes | None
    problems: tuple[str, ...]
    how: str
    downloads: bool = False


def unreadable_files(split: str, images: Images) -> Iterator[str]:
    """What is wrong with the files of a split, of which only the beginnings are read: one that is
    cut off passes."""
    bad = [path for path in images.files if not _begins_as_an_image(path)]
    if bad:
        yield (
            f"{len(bad)} of {len(images)} {split} images are missing or no images, "
            f"the first is {bad[0]}"
        )


def _begins_as_an_image(path: Path) -> bool:
    try:
        with Image.open(path):
            return True
    except (OSError, SyntaxError, ValueError):
        return False
