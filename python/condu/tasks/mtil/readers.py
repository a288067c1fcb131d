"""Data sets on disk, read by torchvision: splits of RGB images that are decoded on demand."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path
from typing import Any

import numpy as np
import xxhash
from PIL import Image
from torch.utils.data import Dataset
from torchvision import datasets

from condu.tasks.mtil.sources import Sizes, Source
from condu.tasks.mtil.splits import random_split


class DataError(ValueError):
    """A data set on disk that is missing or damaged; the message names it and the file."""

    def __init__(self, message: str) -> None:
        # A worker process of a DataLoader hands on its traceback as the message: the last line of
        # that is what was raised.
        super().__init__(message.rpartition(f"{type(self).__name__}: ")[2].strip())


class Images(Dataset[tuple[Image.Image, int]]):
    """Images of one split as (RGB image, int label); `take` gives some of them.

    files: of every image of the reader, or empty where one file holds them all. rows: which of the
    reader's images, and in which order.
    """

    def __init__(
        self,
        name: str,
        reader: Any,
        labels: np.ndarray,
        files: Sequence[Path],
        rows: np.ndarray,
    ) -> None:
        self.name = name
        self._reader = reader
        self._labels = labels
        self._files = files
        self._rows = rows

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        row = self._rows[index]
        try:
            image, label = self._reader[int(row)]
            return image.convert("RGB"), int(label)
        except (OSError, SyntaxError, ValueError) as error:  # whatever PIL makes of a bad file
            where = self._files[row] if self._files else f"image {row}"
            raise DataError(f"{self.name}: {where} cannot be read: {error}") from error

    @property
    def labels(self) -> np.ndarray:
        """int64 [images], without decoding any."""
        return self._labels[self._rows]

    @property
    def files(self) -> list[Path]:
        """Of each image; empty where one file holds them all."""
        return [self._files[row] for row in self._rows] if self._files else []

    def digest(self) -> str:
        """Hash of which images these are: of the labels, and of the pixels where one file holds
        all, else of each file's name, size and time of change. DataError for a missing file."""
        digest = xxhash.xxh3_128(self.labels.tobytes())
        if not self._files:
            digest.update(np.ascontiguousarray(self._reader.data)[self._rows].tobytes())
        for file in self.files:
            try:
                facts = os.stat(file)
            except OSError as error:
                raise DataError(f"{self.name}: {file} cannot be read: {error}") from error
            digest.update(f"{file.name} {facts.st_size} {facts.st_mtime_ns}\n".encode())
        return digest.hexdigest()

    def take(self, indices: np.ndarray) -> Images:
        """The images at ``indices`` of this split."""
        return Images(self.name, self._reader, self._labels, self._files, self._rows[indices])


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


def open_source(source: Source, root: Path, *, download: bool = False) -> Opened:
    """Find a data set below ``root``, or fetch it there first with ``download``.

    Lists are read, images are not (those of CIFAR100 and MNIST, which are single files, are).
    Raises DataError: something is missing, with what goes where; it cannot be downloaded; its lists
    make no sense.
    """
    if absent := missing(source, root):
        if not (download and source.downloads):
            raise DataError(f"{source.name}: {absent[0]} is missing; {instructions(source, root)}")
        _download(source, root)
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
