"""MTIL as a benchmark: its data sets, opened where they are."""

from __future__ import annotations

import os
import warnings
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from condu.tasks.benchmark import Benchmark, Task
from condu.tasks.few_shot import few_shot
from condu.tasks.images import split_of
from condu.tasks.mtil.classnames import classnames
from condu.tasks.mtil.readers import Opened, check_present, open_source, sizes
from condu.tasks.mtil.sources import ORDERS, SOURCES, Source


def mtil_benchmark(
    root: str | os.PathLike[str],
    names: Sequence[str] = ORDERS["I"],
    *,
    shots: int | None = None,
    seed: int = 0,
    download: bool = False,
    workers: int = 0,
) -> Benchmark:
    """The data sets ``names`` below ``root``, in that order.

    All are opened here, so that nothing turns out to be missing after hours of training; images
    are decoded when they are asked for, in ``workers`` processes. ``shots`` keeps so many training
    images of each class, drawn with ``seed``. ``download`` fetches what is missing and can be had.

    Raises DataError as `open_source` does, ValueError for a name that is not one of MTIL's. Warns
    of a data set whose sizes are not those of the published numbers.
    """
    sources = {source.name: source for source in SOURCES}
    for name in names:
        if name not in sources:
            raise ValueError(f"MTIL has no data set {name!r}, only {', '.join(sources)}")
    folder = Path(root).expanduser()
    for name in names:  # what nobody fetches, before the others are
        if not (download and sources[name].downloads):
            check_present(sources[name], folder)
    tasks = [
        _task(sources[name], open_source(sources[name], folder, download=download), shots, seed)
        for name in names
    ]
    return Benchmark("mtil", tuple(tasks), workers=workers)


def _task(source: Source, opened: Opened, shots: int | None, seed: int) -> Task:
    found = sizes(opened)
    if found != source.sizes:
        warnings.warn(
            f"{source.name}: {found}, but {source.sizes} in the published numbers, which cannot be "
            "compared (condu data check says what is missing)",
            stacklevel=3,
        )
    train = opened.train
    if shots is not None:
        train = train.take(few_shot(train.labels, shots, seed=seed, name=source.name))
    return Task(
        source.name,
        classnames(source.name, opened.own_names),
        source.templates,
        partial(split_of, train, opened.test),
    )
