"""Writing more files than may be open."""

from __future__ import annotations

import os
import resource
from pathlib import Path

import pytest
import torch
from apart import apart
from safetensors.torch import save_file

from condu import checkpoint
from condu.checkpoint import file_writer
from condu.checkpoint.file_writer import FileWriter
from condu_ext import UnifiedDelta


def many_tasks(folder: Path) -> None:
    resource.setrlimit(resource.RLIMIT_NOFILE, (450, 450))
    tasks = {f"task {k}": folder / "tuned.safetensors" for k in range(400)}
    checkpoint.unify(folder / "base.safetensors", tasks, folder / "state")


def test_many_tasks_with_few_open_files(tmp_path: Path) -> None:
    for name, value in (("base", 0.0), ("tuned", 1.0)):
        save_file({"w": torch.full((70_000,), value)}, tmp_path / f"{name}.safetensors")
    assert apart(many_tasks, tmp_path).error is None
    assert len(UnifiedDelta.load(tmp_path / "state").tasks) == 400


def test_settled_files_are_synced_though_closed_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(file_writer, "_OPEN_FILES", 2)
    synced: list[str] = []
    sync = os.fsync

    def noted(descriptor: int) -> None:
        synced.append(os.path.basename(os.readlink(f"/proc/self/fd/{descriptor}")))
        sync(descriptor)

    monkeypatch.setattr(os, "fsync", noted)
    writer = FileWriter(tmp_path)
    for round_ in range(2):
        for name in "abcde":
            writer.write(name, 3 * round_, f"{name}{round_} ".encode())
    writer.settle("abcx")  # x was written by another process
    assert sorted(synced) == ["a", "b", "c"]
    writer.settle("abcde")
    writer.close()
    assert sorted(synced) == ["a", "b", "c", "d", "e"]
    assert (tmp_path / "a").read_bytes() == b"a0 a1 "
    assert not (tmp_path / "x").exists()
    assert not [f for f in os.listdir("/proc/self/fd") if str(tmp_path) in link(f)]


def link(descriptor: str) -> str:
    try:
        return os.readlink(f"/proc/self/fd/{descriptor}")
    except OSError:  # that of the listing itself
        return ""
