"""Images on disk as one split of a task, decoded when they are asked for."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import xxhash
from PIL import Image, UnidentifiedImageError
from torch.utils.data import Dataset


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
            where = str(self._files[row]) if self._files else f"image {row}"
            reason = "it is no image" if isinstance(error, UnidentifiedImageError) else error
            named = "" if where.startswith(self.name) else f"{self.name}: "
            raise DataError(f"{named}{where} cannot be read: {reason}") from error

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


def split_of(train: Images, test: Images, split: str) -> Images:
    """The one that a task asks for."""
    return train if split == "train" else test
