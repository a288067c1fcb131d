"""Sharded models (DTensor, FSDP2) over 1, 2 and 4 processes with gloo, against one process.

The cases are in shard_fusing.py, shard_storage.py and shard_refusals.py. Starting a process takes
seconds, so one group for each size runs all cases, and the tests here tell what came out.
"""

from __future__ import annotations

import functools
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from shard_worker import CASES, NEEDS_FOUR

GROUP_TIMEOUT = 300.0  # seconds; a collective that waits in vain gives up after 60
WORLDS = (1, 2, 4)
NAMES = [case.__name__ for case in CASES]


class Outcomes:
    """What came out, by world size, process and case; a group runs when it is first asked for."""

    def __init__(self, folders: pytest.TempPathFactory) -> None:
        self._folders = folders
        self.of = functools.cache(self._run)

    def _run(self, world: int) -> list[tuple[dict[str, str], str]]:
        """For each process its outcomes and its output."""
        folder = self._folders.mktemp(f"shards-{world}")
        worker = Path(__file__).with_name("shard_worker.py")
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        logs = [folder / f"{rank}.log" for rank in range(world)]
        processes = []
        for rank, log in enumerate(logs):
            with open(log, "w") as output:
                command = [sys.executable, str(worker), str(rank), str(world), str(folder)]
                processes.append(
                    subprocess.Popen(command, env=environment, stdout=output, stderr=output)
                )
        end = time.monotonic() + GROUP_TIMEOUT
        try:
            for process in processes:
                process.wait(max(end - time.monotonic(), 0.1))
        except subprocess.TimeoutExpired:
            pass  # the cases that were not reached fail
        finally:
            for process in processes:
                process.kill()
                process.wait()
        files = [folder / f"{rank}.json" for rank in range(world)]
        return [
            (json.loads(file.read_text()) if file.exists() else {}, log.read_text())
            for file, log in zip(files, logs, strict=True)
        ]


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> Outcomes:
    return Outcomes(tmp_path_factory)


@pytest.mark.parametrize(
    ("world", "name"),
    [(w, name) for w in WORLDS for name in NAMES if w == 4 or not name.endswith(NEEDS_FOUR)],
)
def test_sharded(world: int, name: str, outcomes: Outcomes) -> None:
    for rank, (found, log) in enumerate(outcomes.of(world)):
        outcome = found.get(name, f"not reached\n{log[-2000:]}")
        assert not outcome, f"rank {rank} of {world}: {outcome}"
