from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from condu.tasks import load_benchmark
from condu.tasks.mini.model import MiniTokenizer
from condu.tasks.mini.reference import mini_reference
from condu.tasks.reference import ReferenceSet, read_reference


def pixels(reference: ReferenceSet) -> np.ndarray:
    return np.stack([np.asarray(reference.images[i]) for i in range(len(reference.images))])


def test_the_embedded_reference_set_comes_with_its_benchmark() -> None:
    benchmark = load_benchmark("mini", seed=1).subset(2)
    assert benchmark.reference is not None
    reference = benchmark.reference()
    assert pixels(reference).shape == (512, 32, 32, 3)
    assert len(reference.captions) == 512
    assert MiniTokenizer()(reference.captions).shape[0] == 512  # or it names the word or the text
    mini_reference.cache_clear()
    assert np.array_equal(pixels(mini_reference(1)), pixels(reference))
    assert not np.array_equal(pixels(mini_reference(0)), pixels(reference))


def test_captions_say_what_no_task_does() -> None:
    captions = set(mini_reference().captions)
    for task in load_benchmark("mini"):
        for template in task.templates:
            assert captions.isdisjoint(template.format(name) for name in task.classnames)
    assert all(" of " in caption for caption in captions)  # a shape of a texture
    assert len(captions) > 300


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "images" / "deeper").mkdir(parents=True)
    Image.new("L", (4, 6), 100).save(tmp_path / "images" / "b.png")
    Image.new("RGB", (5, 5), (1, 2, 3)).save(tmp_path / "images" / "deeper" / "a.JPEG")
    (tmp_path / "images" / "notes.txt").write_text("not an image")
    (tmp_path / "captions").mkdir()
    (tmp_path / "captions" / "1.tsv").write_text("a red fox\thttp://example.org/1\n\n a lake \n")
    (tmp_path / "captions" / "2.txt").write_text("snow\n")
    return tmp_path


def test_images_and_captions_are_read_from_folders(folder: Path) -> None:
    reference = read_reference(folder / "images", folder / "captions")
    assert reference.captions == ("a red fox", "a lake", "snow")
    found = [reference.images[i] for i in range(len(reference.images))]
    assert [image.mode for image in found] == ["RGB", "RGB"]
    assert sorted(image.size for image in found) == [(4, 6), (5, 5)]
    data = reference.dataset(lambda image: torch.tensor(image.size))
    assert [data[i].tolist() for i in range(len(data))] == [list(image.size) for image in found]


def test_captions_may_be_one_file(folder: Path) -> None:
    reference = read_reference(folder / "images", folder / "captions" / "1.tsv")
    assert reference.captions == ("a red fox", "a lake")


@pytest.mark.parametrize(
    ("images", "captions", "message"),
    [
        ("nowhere", "captions", "images: there is no image in a folder '.*nowhere'"),
        ("captions", "captions", "images: there is no image in a folder '.*captions'"),
        ("images", "nowhere", "captions: there is no caption in '.*nowhere'"),
        ("images", "images/deeper", "captions: there is no caption in '.*deeper'"),
    ],
)
def test_what_is_missing_is_named(folder: Path, images: str, captions: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        read_reference(folder / images, folder / captions)
