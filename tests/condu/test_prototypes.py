from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from condu.prototypes import PrototypeSet


def unit(*rows: list[float]) -> Tensor:
    return torch.nn.functional.normalize(torch.tensor(rows), dim=-1)


@pytest.fixture
def two_tasks() -> PrototypeSet:
    prototypes = PrototypeSet()
    prototypes.add("b", torch.eye(3), torch.tensor([0, 1, 1]), torch.eye(3)[:2])
    prototypes.add("a/../ü", torch.eye(3), torch.tensor([0, 0, 0]), torch.eye(3)[2:])
    return prototypes


def test_prototype_is_mean_of_normalised_images_plus_text() -> None:
    images = torch.tensor([[10.0, 0, 0], [0, 0.1, 0], [0, 0, 7.0]])  # lengths must not matter
    text = torch.tensor([[0, 0, 0.5], [0.25, 0, 0]])  # used as they are, shorter than 1
    prototypes = PrototypeSet()
    prototypes.add("t", images, torch.tensor([0, 0, 1]), text)
    torch.testing.assert_close(prototypes["t"], unit([0.5, 0.5, 0.5], [0.25, 0.0, 1.0]))
    assert prototypes["t"].dtype == torch.float32


def test_half_precision_features_are_averaged_exactly() -> None:
    count = 3000  # a bfloat16 running sum of ones stops at 256
    images = torch.tensor([[1.0, 0.0]] * count + [[0.0, 1.0]] * count, dtype=torch.bfloat16)
    prototypes = PrototypeSet()
    prototypes.add(
        "t", images, torch.zeros(2 * count, dtype=torch.int32), torch.tensor([[0.0, 0.5]])
    )
    torch.testing.assert_close(prototypes["t"], unit([0.5, 1.0]))


def test_order_offsets_and_membership(two_tasks: PrototypeSet) -> None:
    bank, offsets = two_tasks.features()
    assert two_tasks.tasks == tuple(two_tasks) == ("b", "a/../ü")
    assert offsets.tolist() == [0, 2, 3]
    assert torch.equal(bank[2:], two_tasks["a/../ü"])
    assert "b" in two_tasks
    assert "c" not in two_tasks
    assert len(two_tasks) == 2


def test_empty_set() -> None:
    bank, offsets = PrototypeSet().features()
    assert bank.shape == (0, 0)
    assert offsets.tolist() == [0]


def test_drop_and_rename_keep_the_order(two_tasks: PrototypeSet) -> None:
    before = two_tasks["b"]
    two_tasks.rename("b", "z")
    assert two_tasks.tasks == ("z", "a/../ü")
    assert torch.equal(two_tasks["z"], before)
    with pytest.raises(ValueError, match=r"'a/\.\./ü' already"):
        two_tasks.rename("z", "a/../ü")
    two_tasks.drop("z")
    assert two_tasks.tasks == ("a/../ü",)
    for call in (two_tasks.drop, two_tasks.__getitem__, lambda t: two_tasks.rename(t, "n")):
        with pytest.raises(KeyError, match="no prototypes of task 'z'"):
            call("z")


@pytest.mark.parametrize(
    ("images", "labels", "text", "message"),
    [
        (torch.eye(3), [0, 0, 2], torch.eye(3), "class 1 of 3 has no images"),
        (torch.empty(0, 3), [], torch.eye(3), "class 0 of 3 has no images"),
        (torch.eye(3), [0, 1, 3], torch.eye(3), "from 0 to 2, got 3"),
        (torch.eye(3), [0, -1, 2], torch.eye(3), "from 0 to 2, got -1"),
        (torch.eye(3), [0.0, 1.0, 2.0], torch.eye(3), "labels must be 3 integers"),
        (torch.eye(3), [0, 1], torch.eye(3), "labels must be 3 integers"),
        (torch.eye(4), [0, 1, 2, 2], torch.eye(3), r"image_features must be \[M, 3\]"),
        (torch.eye(3), [0, 0, 0], torch.zeros(0, 3), r"text_features must be \[classes, D\]"),
        (torch.eye(3) * torch.nan, [0, 1, 2], torch.eye(3), "image_features hold .* not finite"),
        (torch.eye(3), [0, 1, 2], torch.eye(3) / 0.0, "text_features hold .* not finite"),
        (torch.eye(3), [0, 1, 2], -torch.eye(3), "class 0 cancel out"),
    ],
)
def test_bad_input_names_the_task_and_adds_nothing(
    images: Tensor, labels: list[int], text: Tensor, message: str
) -> None:
    prototypes = PrototypeSet()
    with pytest.raises(ValueError, match=rf"'t'.*{message}"):
        prototypes.add(
            "t", images, torch.tensor(labels, dtype=None if labels else torch.int64), text
        )
    assert not prototypes.tasks


def test_refuses_a_duplicate_and_another_dimension(two_tasks: PrototypeSet) -> None:
    with pytest.raises(ValueError, match="'b' already"):
        two_tasks.add("b", torch.eye(3), torch.tensor([0, 1, 2]), torch.eye(3))
    with pytest.raises(ValueError, match=r"'c'.* 2 dimensions, those of task 'b' have 3"):
        two_tasks.add("c", torch.eye(2), torch.tensor([0, 1]), torch.eye(2))


def test_save_and_load(two_tasks: PrototypeSet, tmp_path: Path) -> None:
    path = tmp_path / "prototypes.safetensors"
    path.write_bytes(b"old")
    os.link(path, tmp_path / "reader")  # someone has the old file open
    two_tasks.save(path)
    assert (tmp_path / "reader").read_bytes() == b"old"
    loaded = PrototypeSet.load(path)
    assert loaded.tasks == two_tasks.tasks
    assert all(torch.equal(loaded[t], two_tasks[t]) for t in two_tasks)
    assert sorted(os.listdir(tmp_path)) == [path.name, "reader"]

    PrototypeSet().save(path)
    assert PrototypeSet.load(path).tasks == ()


def test_a_failed_save_keeps_the_old_file(
    two_tasks: PrototypeSet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "prototypes.safetensors"
    two_tasks.save(path)
    before = path.read_bytes()

    def full_disk(fd: int) -> None:
        raise OSError("no space left")

    monkeypatch.setattr(os, "fsync", full_disk)
    with pytest.raises(OSError, match="no space"):
        two_tasks.save(path)
    assert path.read_bytes() == before
    assert os.listdir(tmp_path) == [path.name]


def test_load_refuses_what_is_not_a_prototype_set(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes(b"not safetensors at all")
    with pytest.raises(ValueError, match=r"x\.safetensors: not a readable"):
        PrototypeSet.load(path)
    save_file({"0": torch.eye(2)}, path)
    with pytest.raises(ValueError, match=r"x\.safetensors: not a prototype set"):
        PrototypeSet.load(path)
    header = {"format": "condu-prototypes", "version": "1", "tasks": '["a", "b"]'}
    save_file({"0": torch.eye(2)}, path, metadata=header)
    with pytest.raises(ValueError, match=r"x\.safetensors: tasks .*'b'.* but tensors \['0'\]"):
        PrototypeSet.load(path)
    with pytest.raises(FileNotFoundError):
        PrototypeSet.load(tmp_path / "missing.safetensors")
