"""ConDU of a module that FSDP2 shards over two processes."""

from __future__ import annotations

import time
from pathlib import Path

import torch.multiprocessing as mp
from fsdp_worker import fuse

PROCESSES = 2


def test_a_sharded_module_is_fused_as_a_whole_one(tmp_path: Path) -> None:
    arguments = (PROCESSES, tmp_path)
    group = mp.start_processes(fuse, arguments, PROCESSES, join=False, start_method="spawn")
    end = time.monotonic() + 200
    try:
        while not group.join(5):  # raises what a process raised
            assert time.monotonic() < end, "the processes hang"
    finally:
        for process in group.processes:
            process.kill()
