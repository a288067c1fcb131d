"""The eleven formats on disk, whole, damaged and missing."""

from __future__ import annotations

import os
import pickle
from pathlib import Path

import mtil_folders
import numpy as np
import pytest
import torch
from mtil_folders import COLOURS, PER_CLASS, WRITERS
from scipy.io import savemat
from torch.utils.data import DataLoader
from torchvision import datasets

from condu.tasks.images import DataError, Images
from condu.tasks.mtil import SOURCES
from condu.tasks.mtil.readers import missing, open_source
from condu.tasks.mtil.tasks import mtil_benchmark

SOURCE = {source.name: source for source in SOURCES}
RANDOMLY_SPLIT = ("Caltech101", "EuroSAT", "SUN397")
COLOURED = tuple(name for name in WRITERS if name not in ("MNIST", "Flowers102"))


@pytest.fixture
def write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    return lambda *names: mtil_folders.write(tmp_path, *names, monkeypatch=monkeypatch)


def colours(images: Images) -> np.ndarray:
    """Which of the three colours each image is nearest to."""
    means = np.stack([np.asarray(images[i][0], float).mean((0, 1)) for i in range(len(images))])
    return np.abs(COLOURS - means[:, None]).sum(2).argmin(1)


@pytest.mark.parametrize("name", WRITERS)
def test_images_are_rgb_with_the_label_of_their_class(write, name: str) -> None:
    opened = open_source(SOURCE[name], write(name))
    for images in (opened.train, opened.test):
        decoded = [images[i] for i in range(len(images))]
        assert {image.mode for image, _ in decoded} == {"RGB"}
        assert [label for _, label in decoded] == images.labels.tolist()
        assert set(images.labels.tolist()) == set(range(len(opened.own_names)))
        assert all(type(label) is int for _, label in decoded)


@pytest.mark.parametrize("name", COLOURED)
def test_labels_belong_to_the_pixels(write, name: str) -> None:
    opened = open_source(SOURCE[name], write(name))
    right = [colours(images) == images.labels for images in (opened.train, opened.test)]
    grey = 3 if name == "Caltech101" else 0  # images that are nearest to no colour
    assert np.concatenate(right).sum() >= len(opened.train) + len(opened.test) - grey


@pytest.mark.parametrize("name", WRITERS)
def test_training_and_test_images_are_different_ones(write, name: str) -> None:
    opened = open_source(SOURCE[name], write(name))
    if name in RANDOMLY_SPLIT:
        whole = 3 * 2 * PER_CLASS
        assert (len(opened.train), len(opened.test)) == (int(0.8 * whole), whole - int(0.8 * whole))
    if opened.train.files:
        everything = [*opened.train.files, *opened.test.files]
        assert len(set(everything)) == len(everything)
        assert all(file.is_file() for file in everything)


def test_the_split_of_sun397_does_not_depend_on_the_order_of_the_file_system(
    write, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = write("SUN397")
    expected = open_source(SOURCE["SUN397"], root)
    rglob = Path.rglob
    monkeypatch.setattr(Path, "rglob", lambda path, *a: reversed(list(rglob(path, *a))))
    found = open_source(SOURCE["SUN397"], root)
    assert found.train.files == expected.train.files
    assert found.train.labels.tolist() == expected.train.labels.tolist()


def test_files_and_labels_stay_together_in_a_subset(write) -> None:
    train = open_source(SOURCE["EuroSAT"], write("EuroSAT")).train
    some = train.take(np.array([5, 0, 9]))
    assert some.files == [train.files[i] for i in (5, 0, 9)]
    assert some.labels.tolist() == [train.labels[i] for i in (5, 0, 9)]
    assert [some[i][1] for i in range(3)] == some.labels.tolist()
    twice = some.take(np.array([2]))
    assert twice.files == [train.files[9]]


def needed() -> list[tuple[str, str]]:
    return [(source.name, path) for source in SOURCES for path in source.needed]


@pytest.mark.parametrize(("name", "path"), needed())
def test_what_is_missing_is_named_with_where_it_goes(write, name: str, path: str) -> None:
    root = write(name)
    os.rename(root / path, root / "elsewhere")
    assert missing(SOURCE[name], root) == [root / path]
    with pytest.raises(DataError) as error:
        open_source(SOURCE[name], root)
    assert str(error.value).startswith(f"{name}: {root / path} is missing; ")
    assert str(root) in str(error.value).partition("missing; ")[2]
    assert "\n" not in str(error.value)


def cut_off(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2 + 3)


@pytest.mark.parametrize(
    ("name", "path"),
    [
        ("Aircraft", "fgvc-aircraft-2013b/data/variants.txt"),
        ("CIFAR100", "cifar-100-python/train"),
        ("CIFAR100", "cifar-100-python/meta"),
        ("Flowers102", "flowers-102/imagelabels.mat"),
        ("Flowers102", "flowers-102/setid.mat"),
        ("Food101", "food-101/meta/test.json"),
        ("MNIST", "MNIST/raw/t10k-images-idx3-ubyte"),
        ("OxfordPet", "oxford-iiit-pet/annotations/test.txt"),
        ("StanfordCars", "stanford_cars/devkit/cars_train_annos.mat"),
        ("StanfordCars", "stanford_cars/cars_test_annos_withlabels.mat"),
        ("SUN397", "SUN397/ClassName.txt"),
    ],
)
def test_a_list_that_was_cut_off_is_reported_as_damage(write, name: str, path: str) -> None:
    root = write(name)
    cut_off(root / path)
    with pytest.raises(DataError, match=rf"^{name}: what is in {root} is damaged \(\w+: "):
        open_source(SOURCE[name], root)


def test_a_pickle_that_is_not_cifar_is_never_loaded(write, tmp_path: Path) -> None:
    root = write("CIFAR100")
    trap = tmp_path / "sprung"
    (root / "cifar-100-python" / "test").write_bytes(pickle.dumps(Trap(trap)))
    with pytest.raises(DataError, match="damaged"):
        open_source(SOURCE["CIFAR100"], root)
    assert not trap.exists()


class Trap:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def test_a_class_of_one_split_only_is_refused(write) -> None:
    root = write("DTD")
    listed = root / "dtd/dtd/labels/test1.txt"
    kept = [line for line in listed.read_text().splitlines() if "woven" not in line]
    listed.write_text("\n".join(kept) + "\n")
    expected = (
        "3 classes and test images 2; number 2 is 'woven' in the first and None in the second"
    )
    with pytest.raises(DataError, match=f"DTD: training images have {expected}"):
        open_source(SOURCE["DTD"], root)


def test_classes_that_are_numbered_otherwise_in_the_test_list_are_refused(write) -> None:
    root = write("OxfordPet")
    listed = root / "oxford-iiit-pet/annotations/test.txt"
    swap = {"1": "2", "2": "1", "3": "3"}
    rows = [line.split() for line in listed.read_text().splitlines()]
    listed.write_text("".join(f"{name} {swap[label]} 1 1\n" for name, label, *_ in rows))
    with pytest.raises(DataError, match="number 0 is 'Abyssinian' in the first and 'American"):
        open_source(SOURCE["OxfordPet"], root)


def test_a_label_without_a_class_is_refused(write) -> None:
    root = write("StanfordCars")
    row = np.array([(9, "00001.jpg"), (1, "00002.jpg")], [("class", object), ("fname", object)])
    savemat(root / "stanford_cars/devkit/cars_train_annos.mat", {"annotations": row})
    with pytest.raises(DataError, match=r"StanfordCars: training images .* 0 to 2, got 8"):
        open_source(SOURCE["StanfordCars"], root)


def test_an_empty_list_is_refused(write) -> None:
    root = write("Aircraft")
    (root / "fgvc-aircraft-2013b/data/images_variant_test.txt").write_text("")
    with pytest.raises(DataError, match="Aircraft: there are no test images"):
        open_source(SOURCE["Aircraft"], root)


@pytest.mark.parametrize(
    ("damage", "workers"),
    [(cut_off, 0), (os.unlink, 0), (lambda path: path.write_bytes(b""), 0), (cut_off, 1)],
)
def test_a_bad_image_is_named_also_by_a_worker_process(write, damage, workers: int) -> None:
    images = open_source(SOURCE["OxfordPet"], write("OxfordPet")).test
    damage(images.files[4])
    loader = DataLoader(images, batch_size=None, num_workers=workers)
    with pytest.raises(DataError) as error:
        list(loader)
    assert str(error.value).startswith(f"OxfordPet: {images.files[4]} cannot be read: ")
    assert "\n" not in str(error.value)


# Downloads


def test_download_fetches_only_what_is_missing(
    write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write("DTD")
    fetched = []

    def fetch(self: datasets.EuroSAT) -> None:
        fetched.append(self.root)
        mtil_folders.eurosat(tmp_path)

    monkeypatch.setattr(datasets.EuroSAT, "download", fetch)
    monkeypatch.setattr(datasets.DTD, "_download", lambda self: pytest.fail("it is there"))
    with pytest.warns(UserWarning, match="published"):
        benchmark = mtil_benchmark(tmp_path, ["DTD", "EuroSAT"], download=True)
    assert [str(root) for root in fetched] == [str(tmp_path)]
    assert len(benchmark["EuroSAT"].load("train")) == 57


def test_a_download_that_fails_says_how_to_do_it_by_hand(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(self: datasets.DTD) -> None:
        raise OSError("no route to host")

    monkeypatch.setattr(datasets.DTD, "_download", fail)
    expected = r"DTD: the download failed \(OSError: no route to host\); by hand: unpack dtd-r1"
    with pytest.raises(DataError, match=expected):
        open_source(SOURCE["DTD"], tmp_path, download=True)


def test_nothing_is_downloaded_before_what_cannot_be_is_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(datasets.DTD, "_download", lambda self: pytest.fail("fetched"))
    with pytest.raises(DataError, match=r"StanfordCars: .* is missing"):
        mtil_benchmark(tmp_path, ["DTD", "StanfordCars"], download=True)


def test_what_torchvision_cannot_download_is_not_tried(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"cars_meta.mat is missing; .*cars_test\.tgz in"):
        open_source(SOURCE["StanfordCars"], tmp_path, download=True)
    assert list(tmp_path.iterdir()) == []


# The benchmark


@pytest.mark.filterwarnings("ignore:.*published numbers")
def test_a_benchmark_has_the_named_data_sets_in_their_order(write) -> None:
    root = write("MNIST", "Food101")
    benchmark = mtil_benchmark(root, ["MNIST", "Food101"], workers=3)
    assert [task.name for task in benchmark] == ["MNIST", "Food101"]
    assert (benchmark.name, benchmark.workers) == ("mtil", 3)
    food = benchmark["Food101"]
    assert food.classnames == ("apple pie", "hot dog", "waffles")
    pixels, label = food.dataset("test", lambda image: torch.tensor(image.size))[0]
    assert (pixels.tolist(), label) == ([20, 20], 0)
    assert food.load("test").files[0].name == "900.jpg"
    assert food.load("train").files[0].name == "0.jpg"


@pytest.mark.filterwarnings("ignore:.*published numbers")
def test_shots_leave_the_test_images_alone(write) -> None:
    root = write("Food101")
    (whole,) = mtil_benchmark(root, ["Food101"])
    (few,) = mtil_benchmark(root, ["Food101"], shots=5, seed=1)
    assert np.bincount(few.load("train").labels).tolist() == [5, 5, 5]
    assert set(few.load("train").files) < set(whole.load("train").files)
    assert few.load("test").files == whole.load("test").files
    (other,) = mtil_benchmark(root, ["Food101"], shots=5, seed=2)
    assert other.load("train").files != few.load("train").files


def test_a_benchmark_of_other_sizes_warns(write) -> None:
    expected = r"DTD: 3 classes, 36 training and 36 test images, but 47 classes, 1880"
    with pytest.warns(UserWarning, match=expected):
        mtil_benchmark(write("DTD"), ["DTD"])


def test_an_unknown_data_set_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no data set 'ImageNet', only Aircraft, "):
        mtil_benchmark(tmp_path, ["ImageNet"])
