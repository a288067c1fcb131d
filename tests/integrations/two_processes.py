"""Two processes that train together on the CPU: a gloo group met through a file."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.multiprocessing

PATIENCE = 120  # seconds until a pair that hangs is ended


def run_on_two(function: Callable[[Path], object], folder: Path) -> list[Any]:
    """What ``function(folder)`` returns on rank 0 and rank 1; it must stand in a module.

    An error of one rank is raised here, with its traceback, and ends the other.
    """
    pair = torch.multiprocessing.start_processes(
        _train, (function, folder), nprocs=2, join=False, start_method="spawn"
    )
    deadline = time.monotonic() + PATIENCE
    try:
        while not pair.join(1):  # one second for one of them, or for both
            if time.monotonic() > deadline:
                raise TimeoutError(f"{function.__name__} took more than {PATIENCE} seconds")
    finally:
        for process in pair.processes:
            process.kill()
    return [torch.load(folder / f"rank-{rank}.pt") for rank in range(2)]


def _train(rank: int, function: Callable[[Path], object], folder: Path) -> None:
    # as torchrun leaves it to accelerate and Lightning; a GPU would make them choose NCCL
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": "2",
        "LOCAL_WORLD_SIZE": "2",
        "TORCHELASTIC_RUN_ID": "two",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": "1",  # nobody is to ask there
        "CUDA_VISIBLE_DEVICES": "",
    }
    torch.set_num_threads(1)
    torch.distributed.init_process_group(
        "gloo",
        init_method=f"file://{folder}/store",
        rank=rank,
        world_size=2,
        timeout=timedelta(seconds=PATIENCE // 2),
    )
    torch.save(function(folder), folder / f"rank-{rank}.pt")
    torch.distributed.destroy_process_group()
