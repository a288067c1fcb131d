"""What there is of MTIL below a folder, and what is not as it should be."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np

from condu.tasks.finding import Finding, Sizes, State, unreadable_files
from condu.tasks.images import DataError
from condu.tasks.mtil.readers import (
    Opened,
    instructions,
    missing,
    open_source,
    sizes,
)
from condu.tasks.mtil.sources import SOURCES, Source


def check(root: Path) -> list[Finding]:
    """Look at every data set of MTIL below ``root``: lists are read, and of every image the
    beginning. Nothing is written or fetched."""
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
        yield from unreadable_files(split, images)
