"""Features that outlive a run: found again for the same weights and images, and for no others."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import mtil_folders
import pytest
import torch
from test_mtil_run import config, small_clip

from condu import decoded, evaluation, trainer
from condu.config import difference, make_config
from condu.feature_cache import FeatureCache
from condu.features import encode_images
from condu.models.clip import ClipModel
from condu.prototypes import PrototypeSet
from condu.tasks.benchmark import Task
from condu.tasks.mtil.tasks import mtil_benchmark
from condu.trainer import ContinualTrainer

pytestmark = pytest.mark.filterwarnings("ignore:.*published numbers")


class Kept:
    """A cache in a folder, and how often something had to be computed."""

    def __init__(self, folder: Path, root: Path, names: list[str]) -> None:
        self.cache = FeatureCache(folder)
        self.root = root
        self.benchmark = mtil_benchmark(root, names)
        self.clip = small_clip("small", None)
        self.computed = 0

    def images(self, task: Task, split: Any = "train", clip: ClipModel | None = None) -> Any:
        clip = clip or self.clip
        dataset = task.dataset(split, clip.test_transform)

        def compute() -> tuple[torch.Tensor, torch.Tensor]:
            self.computed += 1
            return encode_images(clip.model, dataset)

        return self.cache.images(clip.model, dataset, compute)


@pytest.fixture
def kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Kept:
    names = ["DTD", "MNIST"]
    root = mtil_folders.write(tmp_path / "data", *names, monkeypatch=monkeypatch)
    return Kept(tmp_path / "features", root, names)


@pytest.mark.parametrize("name", ["DTD", "MNIST"])
def test_the_second_time_nothing_is_computed(kept: Kept, name: str) -> None:
    task = kept.benchmark[name]
    first, second = kept.images(task), kept.images(task)
    assert kept.computed == 1
    for found, expected in zip(second, first, strict=True):
        assert torch.equal(found, expected)
    kept.images(task, "test")
    assert kept.computed == 2


def other_weights(kept: Kept) -> Any:
    with torch.no_grad():
        next(p for n, p in kept.clip.model.named_parameters() if n.endswith("c_fc.bias"))[0] += 1e-6
    return kept.images(kept.benchmark["DTD"])


def other_transform(kept: Kept) -> Any:
    clip = small_clip("small", None)
    clip.test_transform.transforms[-1].mean = (0.5, 0.5, 0.51)
    return kept.images(kept.benchmark["DTD"], clip=clip)


def other_precision(kept: Kept) -> Any:
    with torch.autocast("cpu", torch.bfloat16):
        return kept.images(kept.benchmark["DTD"])


def touched_image(kept: Kept) -> Any:
    os.utime(kept.benchmark["DTD"].load("train").files[3], ns=(1, 1))
    return kept.images(kept.benchmark["DTD"])


def fewer_images(kept: Kept) -> Any:
    return kept.images(mtil_benchmark(kept.root, ["DTD"], shots=5)["DTD"])


def another_data_set(kept: Kept) -> Any:
    return kept.images(kept.benchmark["MNIST"])


CHANGES = [
    other_weights,
    other_transform,
    other_precision,
    touched_image,
    fewer_images,
    another_data_set,
]


@pytest.mark.parametrize("change", CHANGES)
def test_whatever_changes_the_features_is_computed_anew(kept: Kept, change: Any) -> None:
    kept.images(kept.benchmark["DTD"])
    change(kept)
    assert kept.computed == 2


def test_other_labels_of_the_same_images_are_not_mistaken_for_the_old(kept: Kept) -> None:
    _, before = kept.images(kept.benchmark["MNIST"])
    file = kept.root / "MNIST" / "raw" / "train-labels-idx1-ubyte"
    content = bytearray(file.read_bytes())
    content[-1], content[-2] = content[-2], content[-1]
    file.write_bytes(content)
    _, after = kept.images(mtil_benchmark(kept.root, ["MNIST"])["MNIST"])
    assert after.tolist() == [*before[:-2].tolist(), int(before[-1]), int(before[-2])]


def test_an_equal_model_in_another_object_is_the_same(kept: Kept) -> None:
    kept.images(kept.benchmark["DTD"])
    kept.images(kept.benchmark["DTD"], clip=small_clip("of another name", None))
    assert kept.computed == 1


@pytest.mark.parametrize("content", [b"", b"not a file of tensors"])
def test_a_damaged_file_is_replaced(kept: Kept, content: bytes) -> None:
    expected, _ = kept.images(kept.benchmark["DTD"])
    (file,) = kept.cache.folder.iterdir()
    file.write_bytes(content)
    assert torch.equal(kept.images(kept.benchmark["DTD"])[0], expected)
    assert kept.computed == 2
    assert torch.equal(kept.images(kept.benchmark["DTD"])[0], expected)
    assert kept.computed == 2


def test_nothing_is_kept_of_images_that_have_no_digest(kept: Kept) -> None:
    train = kept.benchmark["DTD"].load("train")
    drawn = Task("drawn", ("a", "b", "c"), ("{}",), lambda split: [train[i] for i in range(3)])
    kept.images(drawn)
    kept.images(drawn)
    assert kept.computed == 2
    assert not kept.cache.folder.exists()


def test_text_is_kept_by_its_tokens(kept: Kept) -> None:
    asked: list[int] = []
    model, tokens = kept.clip.model, kept.clip.tokenize(["a cat", "a dog"])

    def text(tokens: torch.Tensor) -> torch.Tensor:
        return kept.cache.text(model, tokens, lambda: asked.append(1) or torch.ones(2, 3))

    assert torch.equal(text(tokens), torch.ones(2, 3))
    assert torch.equal(text(tokens), torch.ones(2, 3))
    assert len(asked) == 1
    text(tokens.flip(0))
    text(tokens[:, None])
    assert len(asked) == 3


def test_what_is_kept_is_not_decoded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = mtil_folders.write(tmp_path / "data", "Aircraft", monkeypatch=monkeypatch)
    monkeypatch.setattr(trainer, "load_model", small_clip)
    values = config(data, tasks=1, workers=0) | {"methods": ["zero_shot"]}
    cached = make_config({**values, "evaluation": {"cache": str(tmp_path / "features")}})
    sizes: list[int] = []
    decode = decoded._decoded

    def counting(dataset: Any, workers: int) -> Any:
        sizes.append(len(dataset))
        return decode(dataset, workers)

    monkeypatch.setattr(decoded, "_decoded", counting)
    for name in ("first", "second"):
        ContinualTrainer.from_config(cached, tmp_path / name).run()
    assert sizes == [36]


def test_a_second_run_reads_what_the_first_has_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = mtil_folders.write(tmp_path / "data", "Aircraft", monkeypatch=monkeypatch)
    monkeypatch.setattr(trainer, "load_model", small_clip)
    values = config(data, tasks=1, workers=0) | {"methods": ["condu"], "training": {"steps": 2}}
    plain = make_config(values)
    cached = make_config({**values, "evaluation": {"cache": str(tmp_path / "features")}})
    assert difference(plain, cached) is None
    encoded: list[int] = []
    encode = evaluation.encode_images

    def counting(model: Any, images: Any, *rest: Any, **options: Any) -> Any:
        encoded.append(len(images))
        return encode(model, images, *rest, **options)

    monkeypatch.setattr(evaluation, "encode_images", counting)
    matrices, images, prototypes = [], [], []
    for name, chosen in (("plain", plain), ("first", cached), ("second", cached)):
        encoded.clear()
        results = ContinualTrainer.from_config(chosen, tmp_path / name).run()
        matrices.append(results["methods"]["condu"]["protocols"]["task-id"]["matrix"])
        images.append(sum(encoded))
        file = tmp_path / name / "prototypes.safetensors"
        prototypes.append(PrototypeSet.load(file)["Aircraft"])
    assert matrices[0] == matrices[1] == matrices[2]
    assert torch.equal(prototypes[0], prototypes[2])
    assert images[0] == images[1]
    assert images[2] == images[1] - 72  # 36 training images for prototypes, 36 test images
