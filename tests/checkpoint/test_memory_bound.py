"""Memory stays below ``max_memory``, however large the model."""

from __future__ import annotations

import re
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from apart import apart
from idle_job import LLAMA_70B, IdleJob
from safetensors.torch import save_file

from condu import checkpoint
from condu.checkpoint import Options, memory
from condu.checkpoint.memory import resident
from condu.checkpoint.runner import Runner
from condu.checkpoint.target import Target
from condu.checkpoint.tensor_files import new_header
from condu.checkpoint.world import World
from condu_ext.layout import CHUNK

MIB = 1 << 20
SHAPES = {"large": (24 * MIB,), "matrix": (4096, 2048), "bias": (100,)}
TASKS = ("a", "b", "c")


def sparse(file: Path) -> Path:
    """A model of 64 MiB, all zeros, which takes no room on the disk."""
    header, _, size = new_header(file, [(n, torch.bfloat16, s) for n, s in SHAPES.items()])
    with open(file, "wb") as stream:
        stream.write(header)
        stream.truncate(size)
    return file


def peak(function: Callable[..., Any], *arguments: Any, **options: Any) -> tuple[int, int]:
    """Bytes of this process's own memory before a call, and at most during it."""
    before = most = resident()
    over = threading.Event()

    def look() -> None:
        nonlocal most
        while not over.wait(0.001):
            most = max(most, resident())

    looking = threading.Thread(target=look)
    looking.start()
    try:
        function(*arguments, **options)
    finally:
        over.set()
        looking.join()
    return before, most


def command(name: str, folder: Path, limit: int, workers: int) -> tuple[int, int]:
    """:func:`peak` of a command with so much memory; units are as large as that lets them be."""
    memory._BEST = 1024 * CHUNK
    files = {task: folder / f"{task}.safetensors" for task in TASKS}
    base, state = folder / "base.safetensors", folder / "state"
    options = Options(max_memory=limit, workers=workers)
    if name == "unify":
        return peak(checkpoint.unify, base, files, state, options=options)
    if name == "absorb":
        return peak(checkpoint.absorb, state, "d", files["a"], base=base, options=options)
    return peak(
        checkpoint.extract, state, "b", folder / f"model-{workers}", base=base, options=options
    )


def test_least_memory(tmp_path: Path) -> None:
    """With the least that a command says it needs it stays within, though models are larger than
    all that is left beside the interpreter."""
    for name in ("base", *TASKS):
        sparse(tmp_path / f"{name}.safetensors")
    for name in ("unify", "absorb", "extract"):
        refused = apart(command, name, tmp_path, MIB, 8)
        assert isinstance(refused.error, ValueError)
        needed = re.fullmatch(
            r"max_memory: 1 MiB are too few; this needs (\d+) MiB", str(refused.error)
        )
        assert needed
        limit = int(needed[1]) * MIB
        ended = apart(command, name, tmp_path, limit, 8)
        assert ended.error is None
        before, most = ended.value
        assert most <= limit
        assert limit - before < 80 * MIB


def many(folder: Path, limit: int) -> tuple[int, int]:
    files = {f"task {k}": folder / "tuned.safetensors" for k in range(60)}
    options = Options(max_memory=limit, workers=4)
    return peak(checkpoint.unify, folder / "base.safetensors", files, folder / "s", options=options)


def test_many_tasks_of_many_tensors(tmp_path: Path) -> None:
    """Where memory is for lists, not for values: 1500 tensors of 3 elements, 60 tasks."""
    for name, value in (("base", 0.0), ("tuned", 1.0)):
        tensors = {f"layers.{k}.weight": torch.full((3,), value) for k in range(1500)}
        save_file(tensors, tmp_path / f"{name}.safetensors")
    needed = re.search(r"needs (\d+) MiB", str(apart(many, tmp_path, MIB).error))
    assert needed
    limit = int(needed[1]) * MIB
    ended = apart(many, tmp_path, limit)
    assert ended.error is None
    before, most = ended.value
    assert most <= limit
    assert limit - before < 200 * MIB


@pytest.mark.parametrize("workers", [1, 8])
def test_room_for_all_workers(tmp_path: Path, workers: int) -> None:
    for name in ("base", *TASKS):
        sparse(tmp_path / f"{name}.safetensors")
    limit = 384 * MIB
    for name in ("unify", "extract"):
        ended = apart(command, name, tmp_path, limit, workers)
        assert ended.error is None
        assert ended.value[1] <= limit


def keep_the_books(folder: Path) -> tuple[int, int]:
    job = IdleJob(LLAMA_70B[: 3 + 9 * 12], 32)
    target = Target(folder, "job", temporary=False)
    target.claim()
    target.start_anew([])
    before, most = peak(Runner(job, target, World(), Options(workers=2)).run)
    target.close()
    return before, most


def test_bookkeeping_does_not_grow_with_the_model(tmp_path: Path) -> None:
    """Of 12 billion parameters and 32 tasks: 130 MB of chunk sums and 50 000 units pass by."""
    begin = time.monotonic()
    ended = apart(keep_the_books, tmp_path / "state")
    assert ended.error is None
    before, most = ended.value
    assert most - before < 32 * MIB
    assert time.monotonic() - begin < 30
