"""Reading parts of many files in many threads."""

from __future__ import annotations

import os
import random
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from condu.checkpoint import tensor_files
from condu.checkpoint.tensor_files import FileReader, StoredTensor, read_header


def open_files(folder: Path) -> set[str]:
    links = Path("/proc/self/fd")
    if not links.is_dir():
        pytest.skip("needs /proc to see which files are open")
    targets = [link.readlink() for link in links.iterdir() if link.is_symlink()]
    return {target.name for target in targets if target.parent == folder}


@pytest.fixture
def tensors(tmp_path: Path) -> list[StoredTensor]:
    found = []
    for k in range(20):
        save_file({"w": torch.arange(1000) + 1000 * k}, tmp_path / f"{k}.safetensors")
        found.append(read_header(tmp_path / f"{k}.safetensors")["w"])
    return found


def test_more_files_than_may_be_open(
    tmp_path: Path, tensors: list[StoredTensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tensor_files, "_OPEN_FILES", 3)
    with FileReader() as reader:

        def read(seed: int) -> None:
            numbers = random.Random(seed)
            for _ in range(200):
                k, start = numbers.randrange(20), numbers.randrange(1000)
                out = torch.empty(1000 - start, dtype=torch.int64)
                reader.read(tensors[k], start, 1000, out)
                assert torch.equal(out, torch.arange(start, 1000) + 1000 * k)

        with ThreadPoolExecutor(4) as pool:
            list(pool.map(read, range(4)))
        read(4)
        assert len(open_files(tmp_path)) == 3
    assert not open_files(tmp_path)


def test_what_was_read_last_stays_open(
    tmp_path: Path, tensors: list[StoredTensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tensor_files, "_OPEN_FILES", 3)
    with FileReader() as reader:
        for k in (0, 1, 2, 0, 3):
            reader.read(tensors[k], 0, 1, torch.empty(1, dtype=torch.int64))
        assert open_files(tmp_path) == {f"{k}.safetensors" for k in (0, 2, 3)}


def test_a_file_that_became_shorter(tmp_path: Path, tensors: list[StoredTensor]) -> None:
    with open(tensors[0].file, "r+b") as file:
        file.truncate(tensors[0].offset + 80)
    with FileReader() as reader:
        out = torch.empty(11, dtype=torch.int64)
        reader.read(tensors[0], 0, 10, out)
        assert out[9] == 9
        with pytest.raises(OSError, match=r"0\.safetensors: ends at byte .* was it changed"):
            reader.read(tensors[0], 0, 11, out)


def test_a_file_stays_open_while_it_is_read(
    tensors: list[StoredTensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    """However many others are read before that is done."""
    real, others = os.preadv, list(range(1, 20))

    def preadv(descriptor: int, buffers: list[memoryview], offset: int) -> int:
        while others:
            reader.read(tensors[others.pop()], 0, 1, torch.empty(1, dtype=torch.int64))
        return real(descriptor, buffers, offset)

    monkeypatch.setattr(tensor_files, "_OPEN_FILES", 3)
    monkeypatch.setattr(os, "preadv", preadv)
    with FileReader() as reader:
        out = torch.empty(1000, dtype=torch.int64)
        reader.read(tensors[0], 0, 1000, out)
    assert torch.equal(out, torch.arange(1000))
