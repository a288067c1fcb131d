"""What each process of test_shards.py runs, and how it tells the test.

    python shard_worker.py RANK WORLD FOLDER

Every case is called by all processes. FOLDER/RANK.json maps its name to an empty text or to what
went wrong; after a failure on any process the rest is not run, for they may be out of step.
"""

from __future__ import annotations

import json
import os
import sys
import traceback
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from shard_fusing import FUSING
from shard_group import Group
from shard_refusals import REFUSALS
from shard_storage import STORAGE

CASES = (*FUSING, *STORAGE, *REFUSALS)
NEEDS_FOUR = "_of_four"  # at the end of a case's name: for four processes only


def main() -> None:
    rank, world, folder = int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3])
    torch.set_num_threads(1)
    store = dist.FileStore(str(folder / "store"), world)
    dist.init_process_group(
        "gloo", store=store, rank=rank, world_size=world, timeout=timedelta(seconds=60)
    )
    group = Group(rank, world, folder)
    outcomes: dict[str, str] = {}
    for case in CASES:
        if case.__name__.endswith(NEEDS_FOUR) and world != 4:
            continue
        try:
            case(group)
            outcomes[case.__name__] = ""
        except (Exception, pytest.fail.Exception):
            outcomes[case.__name__] = traceback.format_exc()
        (folder / f"{rank}.json").write_text(json.dumps(outcomes))
        if any(group.everywhere(outcomes[case.__name__])):
            break
    dist.destroy_process_group()
    os._exit(0)  # threads that FSDP1 leaves now and then abort an interpreter that ends by itself


if __name__ == "__main__":
    main()
