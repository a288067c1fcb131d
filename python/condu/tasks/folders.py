"""A benchmark of your own: a folder for each task, in it a folder for each class.

    ROOT/<task>/train/<class>/*.jpg      and whatever else Pillow reads
    ROOT/<task>/test/<class>/*.jpg
    ROOT/<task>/templates.txt            optional: prompts, one a line, each with one {}

The name of a folder is the name of the task or the class, with spaces for underscores in a class.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import numpy as np
from PIL import Image
from torchvision.datasets import ImageFolder

from condu.tasks.benchmark import Benchmark, Task
from condu.tasks.few_shot import few_shot
from condu.tasks.finding import Finding, Sizes, State, unreadable_files
from condu.tasks.images import DataError, Images, split_of

TEMPLATES = ("a photo of a {}.",)
"""Prompts of a task that brings none."""
RECOGNISED_ONLY = ("BUFR", "EPS", "GRIB", "HDF5", "MPEG", "WMF")
"""Formats that Pillow opens and cannot decode by itself."""


def task_names(root: str | os.PathLike[str]) -> list[str]:
    """The tasks below a folder, by name. DataError if there is none."""
    folder = Path(root).expanduser()
    if not folder.is_dir():
        raise DataError(f"{folder} is not a folder")
    names = sorted(e.name for e in folder.iterdir() if e.is_dir() and e.name[0] != ".")
    if not names:
        raise DataError(f"{folder} has no folder in it: no task")
    return names


def folders_benchmark(
    root: str | os.PathLike[str],
    names: Sequence[str] | None = None,
    *,
    shots: int | None = None,
    seed: int = 0,
    workers: int = 0,
) -> Benchmark:
    """The tasks ``names`` below ``root``, in that order; all of them, by name, if None.

    All are looked through here, so that nothing turns out to be missing after hours of training;
    images are decoded when they are asked for, in ``workers`` processes. ``shots`` keeps so many
    training images of each class, drawn with ``seed``.

    Raises DataError for a folder or a class without images, for classes that differ between
    training and test images, and for a template without exactly one ``{}``; it names the folder.
    """
    folder = Path(root).expanduser()
    chosen = task_names(folder) if names is None else names
    tasks = tuple(open_task(folder / name, shots=shots, seed=seed) for name in chosen)
    return Benchmark("folders", tasks, workers=workers)


def open_task(folder: Path, *, shots: int | None = None, seed: int = 0) -> Task:
    """One task; arguments and errors as those of `folders_benchmark`."""
    train, classes = _images(folder / "train")
    test, test_classes = _images(folder / "test")
    if stranger := set(classes) ^ set(test_classes):
        raise DataError(
            f"{folder}: class {min(stranger)!r} is in "
            f"{'train' if min(stranger) in classes else 'test'} only"
        )
    if shots is not None:
        train = train.take(few_shot(train.labels, shots, seed=seed, name=folder.name))
    names = tuple(name.replace("_", " ") for name in classes)
    try:
        return Task(folder.name, names, _templates(folder), partial(split_of, train, test))
    except ValueError as error:
        raise DataError(f"{folder}: {error}") from None


def check_folders(root: Path) -> list[Finding]:
    """Look at every task below ``root``: of every image the beginning is read. DataError if there
    is no task."""
    return [_find(root / name) for name in task_names(root)]


def _find(folder: Path) -> Finding:
    how = f"put images into {folder}/train/<class> and {folder}/test/<class>"
    try:
        task = open_task(folder)
    except DataError as error:
        return Finding(folder.name, "damaged", None, None, (str(error),), how)
    train, test = (task.load(split) for split in ("train", "test"))
    assert isinstance(train, Images)
    assert isinstance(test, Images)
    found = Sizes(len(task.classnames), len(train), len(test))
    problems = (*unreadable_files("training", train), *unreadable_files("test", test))
    state: State = "incomplete" if problems else "complete"
    return Finding(folder.name, state, None, found, problems, how)


def _images(folder: Path) -> tuple[Images, list[str]]:
    """All images of a split in the order of their paths, and the folders of its classes."""
    if not folder.is_dir():
        raise DataError(f"{folder} is not there")
    try:
        reader = _VisibleFolders(str(folder), is_valid_file=_is_image)
    except OSError as error:  # no classes, or none with an image
        raise DataError(f"{folder}: {error}") from None
    files = [Path(file) for file, _ in reader.samples]
    labels = np.asarray(reader.targets, dtype=np.int64)
    rows = np.arange(len(files))
    return Images(str(folder), reader, labels, files, rows), list(reader.classes)


class _VisibleFolders(ImageFolder):
    """Without those that editors leave, such as .ipynb_checkpoints."""

    def find_classes(self, directory: str | Path) -> tuple[list[str], dict[str, int]]:
        classes, _ = super().find_classes(directory)
        visible = [name for name in classes if name[0] != "."]
        return visible, {name: label for label, name in enumerate(visible)}


def _is_image(path: str) -> bool:
    """By its suffix, of all that Pillow reads. Hidden files are none: macOS puts some beside
    images."""
    file = Path(path)
    kind = Image.registered_extensions().get(file.suffix.lower())
    return kind in Image.OPEN and kind not in RECOGNISED_ONLY and file.name[0] != "."


def _templates(folder: Path) -> tuple[str, ...]:
    file = folder / "templates.txt"
    if not file.exists():
        return TEMPLATES
    try:
        lines = file.read_text(encoding="utf-8-sig").splitlines()  # with or without Windows' mark
    except UnicodeDecodeError:
        raise DataError(f"{file}: is not text in UTF-8") from None
    return tuple(line.strip() for line in lines if line.strip())
