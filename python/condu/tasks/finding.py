"""What is found of a data set on disk, and what is wrong with it."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

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


def absent_files(split: str, images: Images) -> Iterator[str]:
    """What is wrong with the files of a split, which are looked up and not read."""
    bad = [path for path in images.files if not _holds_something(path)]
    if bad:
        yield (
            f"{len(bad)} of {len(images)} {split} images are missing or empty, "
            f"the first is {bad[0]}"
        )


def _holds_something(path: Path) -> bool:
    try:
        return os.stat(path).st_size > 0
    except OSError:
        return False
