"""Tiny copies of MTIL's data sets, each in its real format on disk.

Three classes of 24 images, noise round the colour of their class; MNIST has all ten classes and
Flowers102 all 102, which no file of theirs names.
"""

from __future__ import annotations

import hashlib
import json
import pickle
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from scipy.io import savemat
from torchvision import datasets

PER_CLASS = 12  # images of a class in each split
COLOURS = np.array([(200, 60, 60), (60, 200, 60), (60, 60, 200)])


def pixels(label: int, number: int, side: int) -> np.ndarray:
    """uint8 [side, side, 3]"""
    noise = np.random.default_rng([label, number]).integers(-40, 40, (side, side, 3))
    return (COLOURS[label % 3] + noise).clip(0, 255).astype(np.uint8)


def picture(path: Path, label: int, number: int, mode: str = "RGB") -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels(label, number, 20)).convert(mode).save(path)


def lines(path: Path, *text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(f"{line}\n" for line in text))


def numbered(first: int = 0) -> Iterator[tuple[int, int]]:
    """(number, label) of the images of one split, classes mixed."""
    return ((first + i, i % 3) for i in range(3 * PER_CLASS))


def aircraft(root: Path) -> None:
    data, names = root / "fgvc-aircraft-2013b" / "data", ("707-320", "F/A-18", "Hawk T1")
    lines(data / "variants.txt", *names)
    for split, first in (("train", 1000), ("test", 2000)):
        listed = [f"{number:07d} {names[label]}" for number, label in numbered(first)]
        lines(data / f"images_variant_{split}.txt", *listed)
        for number, label in numbered(first):
            picture(data / "images" / f"{number:07d}.jpg", label, number)


def caltech101(root: Path) -> None:
    folder = root / "caltech101" / "101_ObjectCategories"
    names = {"BACKGROUND_Google": 0, "Faces": 0, "ceiling_fan": 1, "yin_yang": 2}
    for name, label in names.items():
        for number in range(1, 2 * PER_CLASS + 1):
            mode = "L" if number == 1 else "RGB"  # some of the real ones are grey
            picture(folder / name / f"image_{number:04d}.jpg", label, number, mode)


def cifar100(root: Path) -> None:
    folder = root / "cifar-100-python"
    folder.mkdir(parents=True)
    for split, first in (("train", 0), ("test", 5000)):
        chosen = list(numbered(first))
        images = np.stack([pixels(label, number, 32) for number, label in chosen])
        flat = images.transpose(0, 3, 1, 2).reshape(len(chosen), -1)
        content = {"data": flat, "fine_labels": [label for _, label in chosen]}
        (folder / split).write_bytes(pickle.dumps(content))
    names = ["apple", "aquarium_fish", "baby"]
    (folder / "meta").write_bytes(pickle.dumps({"fine_label_names": names}))


def dtd(root: Path) -> None:
    folder, names = root / "dtd" / "dtd", ("banded", "polka-dotted", "woven")
    for split, first in (("train", 0), ("test", 500)):
        files = [
            (f"{names[label]}/{names[label]}_{n:04d}.jpg", label, n) for n, label in numbered(first)
        ]
        lines(folder / "labels" / f"{split}1.txt", *(name for name, _, _ in files))
        for name, label, number in files:
            picture(folder / "images" / name, label, number)


def eurosat(root: Path) -> None:
    for label, name in enumerate(("AnnualCrop", "Forest", "SeaLake")):
        for number in range(1, 2 * PER_CLASS + 1):
            picture(root / "eurosat" / "2750" / name / f"{name}_{number}.jpg", label, number)


def flowers102(root: Path) -> None:
    folder, count = root / "flowers-102", 102 * 2
    labels = np.arange(count) % 102
    for number, label in enumerate(labels, start=1):
        picture(folder / "jpg" / f"image_{number:05d}.jpg", int(label), number)
    savemat(folder / "imagelabels.mat", {"labels": labels + 1})
    ids = np.arange(1, count + 1)
    split = {"trnid": ids[:102], "valid": ids[:1], "tstid": ids[102:]}
    savemat(folder / "setid.mat", split)


def food101(root: Path) -> None:
    folder, names = root / "food-101", ("apple_pie", "hot_dog", "waffles")
    for split, first in (("train", 0), ("test", 900)):
        listed: dict[str, list[str]] = {name: [] for name in names}
        for number, label in numbered(first):
            listed[names[label]].append(f"{names[label]}/{number}")
            picture(folder / "images" / names[label] / f"{number}.jpg", label, number)
        lines(folder / "meta" / f"{split}.json", json.dumps(listed))


def mnist(root: Path) -> None:
    folder = root / "MNIST" / "raw"
    folder.mkdir(parents=True)
    for split, count in (("train", 100), ("t10k", 50)):
        labels = np.arange(count, dtype=np.uint8) % 10
        images = np.stack([np.full((28, 28), 25 * label, np.uint8) for label in labels])
        for kind, array in (("images-idx3", images), ("labels-idx1", labels)):
            header = np.array([0x0800 + array.ndim, *array.shape], dtype=">i4")
            (folder / f"{split}-{kind}-ubyte").write_bytes(header.tobytes() + array.tobytes())


def oxford_pet(root: Path) -> None:
    folder, names = root / "oxford-iiit-pet", ("Abyssinian", "american_bulldog", "Bengal")
    for split, first in (("trainval", 0), ("test", 100)):
        chosen = [(f"{names[label]}_{number}", label, number) for number, label in numbered(first)]
        listed = [f"{name} {label + 1} 1 1" for name, label, _ in chosen]
        lines(folder / "annotations" / f"{split}.txt", *listed)
        for name, label, number in chosen:
            picture(folder / "images" / f"{name}.jpg", label, number)


def stanford_cars(root: Path) -> None:
    folder = root / "stanford_cars"
    names = ("AM General Hummer SUV 2000", "Acura RL Sedan 2012", "Ram C/V Cargo Van Minivan 2012")
    (folder / "devkit").mkdir(parents=True)
    savemat(folder / "devkit" / "cars_meta.mat", {"class_names": np.array(names, dtype=object)})
    annotations = {
        "train": folder / "devkit" / "cars_train_annos.mat",
        "test": folder / "cars_test_annos_withlabels.mat",
    }
    for split, file in annotations.items():
        rows = [(1, 1, 9, 9, label + 1, f"{number:05d}.jpg") for number, label in numbered(1)]
        fields = ("bbox_x1", "bbox_y1", "bbox_x2", "bbox_y2", "class", "fname")
        savemat(file, {"annotations": np.array(rows, dtype=[(field, object) for field in fields])})
        for number, label in numbered(1):
            picture(folder / f"cars_{split}" / f"{number:05d}.jpg", label, number)


def sun397(root: Path) -> None:
    folder, names = root / "SUN397", ("/a/abbey", "/a/apse/indoor", "/y/youth_hostel")
    lines(folder / "ClassName.txt", *names)
    for label, name in enumerate(names):
        for number in range(2 * PER_CLASS):
            picture(folder / name[1:] / f"sun_{chr(97 + number) * 8}.jpg", label, number)


WRITERS: dict[str, Callable[[Path], None]] = {
    "Aircraft": aircraft,
    "Caltech101": caltech101,
    "CIFAR100": cifar100,
    "DTD": dtd,
    "EuroSAT": eurosat,
    "Flowers102": flowers102,
    "Food101": food101,
    "MNIST": mnist,
    "OxfordPet": oxford_pet,
    "StanfordCars": stanford_cars,
    "SUN397": sun397,
}


def write(root: Path, *names: str, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Write data sets (all, unless some are named). Torchvision compares some files with the
    checksums of the real ones: until the test ends, with those of these."""
    for name in names or WRITERS:
        WRITERS[name](root)
    if (cifar := root / "cifar-100-python").exists():
        for attribute, file in (("train_list", "train"), ("test_list", "test")):
            known = [[file, checksum(cifar / file)]]
            monkeypatch.setattr(datasets.CIFAR100, attribute, known)
        meta = {**datasets.CIFAR100.meta, "md5": checksum(cifar / "meta")}
        monkeypatch.setattr(datasets.CIFAR100, "meta", meta)
    if (flowers := root / "flowers-102").exists():
        files = {
            key: (name, checksum(flowers / name)) if key != "image" else (name, md5)
            for key, (name, md5) in datasets.Flowers102._file_dict.items()
        }
        monkeypatch.setattr(datasets.Flowers102, "_file_dict", files)
    return root


def checksum(file: Path) -> str:
    return hashlib.md5(file.read_bytes()).hexdigest()
