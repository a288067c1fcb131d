"""The data sets of MTIL on disk, read by torchvision."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path
from typing import Any

import numpy as np
from torchvision import datasets

from condu.tasks.finding import Sizes
from condu.tasks.images import DataError, Images
from condu.tasks.mtil.sources import Source
from condu.tasks.mtil.splits import random_split


@dataclass(frozen=True)
class Opened:
    """A data set that was found: both splits, and what it calls its classes, in label order."""

    train: Images
    test: Images
    own_names: tuple[str, ...]


def sizes(opened: Opened) -> Sizes:
    """What was found, to be compared with what a complete data set has."""
    return Sizes(len(opened.own_names), len(opened.train), len(opened.test))


def missing(source: Source, root: Path) -> list[Path]:
    """What a data set needs and is not there."""
    return [path for name in source.needed if not (path := root / name).exists()]


def instructions(source: Source, root: Path) -> str:
    """How to get a data set, in one line."""
    return source.how.format(root=root)


def check_present(source: Source, root: Path) -> None:
    """Raises DataError, with what goes where, if a file without which a data set cannot be read is
    not below ``root``."""
    if absent := missing(source, root):
        raise DataError(f"{source.name}: {absent[0]} is missing; {instructions(source, root)}")


def open_source(source: Source, root: Path, *, download: bool = False) -> Opened:
    """Find a data set below ``root``, or fetch it there first with ``download``.

    Lists are read, images are not (those of CIFAR100 and MNIST, which are single files, are).
    Raises DataError: something is missing, with what goes where; it cannot be downloaded; its lists
    make no sense.
    """
    if download and source.downloads and missing(source, root):
        _download(source, root)
    else:
        check_present(source, root)
    try:
        if source.train is None or source.test is None:
            whole = _images(source, root)
            parts = random_split(len(whole[0]))
            train, test = (whole[0].take(rows) for rows in parts)
            names = test_names = whole[1]
        else:
            train, names = _images(source, root, **source.train)
            test, test_names = _images(source, root, **source.test)
    except ModuleNotFoundError:  # of a library, not of data
        raise
    except Exception as error:  # readers trust what they read: anything may come of a damaged file
        reason = f"{type(error).__name__}: {error}"
        raise DataError(
            f"{source.name}: what is in {root} is damaged ({reason}); {instructions(source, root)}"
        ) from error
    for label, (name, other) in enumerate(zip_longest(names, test_names)):
        if name != other:
            raise DataError(
                f"{source.name}: training images have {len(names)} classes and test images "
                f"{len(test_names)}; number {label} is {name!r} in the first and {other!r} in the "
                "second"
            )
    for split, images in (("training", train), ("test", test)):
        if len(images) == 0:
            raise DataError(f"{source.name}: there are no {split} images in {root}")
        for label in (images.labels.min(), images.labels.max()):
            if not 0 <= label < len(names):
                raise DataError(
                    f"{source.name}: {split} images have labels from 0 to {len(names) - 1}, got "
                    f"{label}"
                )
    return Opened(train, test, names)


def _download(source: Source, root: Path) -> None:
    try:
        root.mkdir(parents=True, exist_ok=True)
        getattr(datasets, source.reader)(root, download=True)
    except Exception as error:  # whatever the network, an archive or a checksum does
        raise DataError(
            f"{source.name}: the download failed ({type(error).__name__}: {error}); by hand: "
            f"{instructions(source, root)}"
        ) from error


def _images(source: Source, root: Path, **split: Any) -> tuple[Images, tuple[str, ...]]:
    """All images of a reader in its order (SUN397: of their paths), and its names of classes."""
    reader = getattr(datasets, source.reader)(root, **split)
    files, labels = _entries(reader)
    rows = np.arange(len(labels))
    if isinstance(reader, datasets.SUN397):  # listed as the file system has them
        rows = np.array(sorted(rows, key=lambda row: files[row].as_posix()), dtype=np.int64)
    names = reader.categories if isinstance(reader, datasets.Caltech101) else reader.classes
    return Images(source.name, reader, labels, files, rows), tuple(names)


def _entries(reader: Any) -> tuple[list[Path], np.ndarray]:
    """Files (none where one holds them all) and labels: what torchvision does not offer alike."""
    files: Sequence[Any]
    if isinstance(reader, (datasets.CIFAR100, datasets.MNIST)):
        files, labels = (), reader.targets
    elif isinstance(reader, datasets.EuroSAT):
        files, labels = zip(*reader.samples, strict=True)
    elif isinstance(reader, datasets.StanfordCars):
        files, labels = zip(*reader._samples, strict=True)
    elif isinstance(reader, datasets.OxfordIIITPet):
        files, labels = reader._images, reader._labels
    elif isinstance(reader, datasets.Caltech101):
        folder = Path(reader.root, "101_ObjectCategories")
        labels = reader.y
        files = [
            folder / reader.categories[label] / f"image_{number:04d}.jpg"
            for label, number in zip(labels, reader.index, strict=True)
        ]
    else:
        files, labels = reader._image_files, reader._labels
    return [Path(file) for file in files], np.asarray(labels, dtype=np.int64)
