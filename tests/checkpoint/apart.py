"""Functions in processes of their own, alone or as a process group, that may be killed.

A server that has imported everything forks them, so that each takes milliseconds to begin.
"""

from __future__ import annotations

import os
import pickle
import signal
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from multiprocessing import get_context
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

_CONTEXT = get_context("forkserver")
_CONTEXT.set_forkserver_preload(["apart", "condu.checkpoint", "torch.distributed.device_mesh"])


@dataclass
class Ended:
    """How a process ended.

    Attributes:
        status: exit status, negative for a signal; None if it hung until the time was over.
        value: what the function returned.
        error: what it raised.
    """

    status: int | None
    value: Any = None
    error: BaseException | None = None


def apart(function: Callable[..., Any], *arguments: object, timeout: float = 60) -> Ended:
    """Call a function in a process of its own."""
    (ended,) = _start(1, _alone, (function, arguments), timeout)
    return ended


def together(
    world: int, function: Callable[..., Any], *arguments: object, timeout: float = 60
) -> list[Ended]:
    """Call a function in each of ``world`` processes, which are a gloo group (if more than one)."""
    with tempfile.TemporaryDirectory() as folder:
        store = os.path.join(folder, "store")
        return _start(world, _member, (world, store, function, arguments), timeout)


def _start(
    count: int, target: Callable[..., None], arguments: tuple[Any, ...], timeout: float
) -> list[Ended]:
    with tempfile.TemporaryDirectory() as folder:
        files = [Path(folder, str(number)) for number in range(count)]
        processes = [
            _CONTEXT.Process(target=target, args=(file, number, *arguments))
            for number, file in enumerate(files)
        ]
        for process in processes:
            process.start()
        deadline = time.monotonic() + timeout
        while time.monotonic() < deadline and any(map(_runs, processes)):
            time.sleep(0.01)
        ends = []
        for process, file in zip(processes, files, strict=True):
            hangs = process.is_alive()
            process.kill()
            process.join()
            told = pickle.loads(file.read_bytes()) if file.exists() and not hangs else {}
            ends.append(Ended(None if hangs else process.exitcode, **told))
        return ends


def _runs(process: BaseProcess) -> bool:
    """Whether it neither ended nor was stopped."""
    if not process.is_alive():
        return False
    try:
        state = Path(f"/proc/{process.pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:  # it ended just now, and we shall hear of it
        return True
    return state != "T"


def _alone(file: Path, _: int, function: Callable[..., Any], arguments: tuple[object, ...]) -> None:
    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it
    try:
        told = {"value": function(*arguments)}
    except BaseException as error:
        told = {"error": error}
    file.write_bytes(pickle.dumps(told))


def _member(
    file: Path,
    rank: int,
    world: int,
    store: str,
    function: Callable[..., Any],
    arguments: tuple[object, ...],
) -> None:
    if world > 1:
        dist.init_process_group(
            "gloo",
            store=dist.FileStore(store, world),
            rank=rank,
            world_size=world,
            timeout=timedelta(seconds=60),
        )
    _alone(file, rank, function, arguments)
    os._exit(0)  # as a process that does not wait for the others
