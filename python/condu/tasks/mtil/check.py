"""What there is of MTIL below a folder, and what is not as it should be."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np

from condu.tasks.mtil.readers import (
    DataError,
    Opened,
    instructions,
    missing,
    open_source,
    sizes,
)
from condu.tasks.mtil.sources import SOURCES, Sizes, Source

State = Literal["complete", "missing", "damaged", "incomplete"]


@dataclass(frozen=True)
class Finding:
    """One data set. ``missing``: files that it needs are not there; ``damaged``: what is there
    cannot be read; ``incomplete``: it can, but is not what it should be. `found` is None where
    nothing could be counted. `problems` is empty for what is complete. `how`: where the files come
    from and where they go. `downloads`: whether `benchmark.download` can do that.
    """

    name: str
    state: State
    expected: Sizes
    found: Sizes | None
    problems: tuple[str, ...]
    how: str
    downloads: bool


def check(root: Path) -> list[Finding]:
    """Look at every data set of MTIL below ``root``: lists are read, and every image is looked up
    but not decoded. Nothing is written or fetched."""
    return [_find(source, root) for source in SOURCES]


def _find(source: Source, root: Path) -> Finding:
    how, found = instructions(source, root), None
    state: State = "complete"
    problems: tuple[str, ...] = ()
    if absent := missing(source, root):
        state = "missing"
        problems = tuple(f"{path} is missing" for path in absent)
    else:
        try:
            opened = open_source(source, root)
        except DataError as error:
            state, problems = "damaged", (str(error).removesuffix(f"; {how}"),)
        else:
            found = sizes(opened)
            problems = tuple(_problems(source.sizes, found, opened))
            state = "incomplete" if problems else "complete"
    return Finding(source.name, state, source.sizes, found, problems, how, source.downloads)


def _problems(expected: Sizes, found: Sizes, opened: Opened) -> Iterator[str]:
    if found != expected:
        yield f"found {found}; there should be {expected}"
    for split, images in (("training", opened.train), ("test", opened.test)):
        empty = np.setdiff1d(np.arange(found.classes), images.labels)
        if len(empty):
            first = opened.own_names[empty[0]]
            yield (
                f"{len(empty)} of {found.classes} classes have no {split} images, "
                f"the first is {first!r}"
            )
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
