"""How much of a checkpoint is in memory at a time."""

from __future__ import annotations

from pathlib import Path

import torch

from condu.checkpoint.job import Job
from condu.checkpoint.options import Options
from condu.checkpoint.room import Room
from condu.checkpoint.units import SEGMENTS
from condu_ext.layout import CHUNK

_BEST = 8 * CHUNK
"""Elements of a unit: enough that calls cost nothing, few enough to stay in the caches."""
_SLACK = 4096
"""Bytes of a room that begin no unit: its tensors begin on cache lines."""
_RESERVE = 48 << 20
"""Bytes for everything that grows neither with the room nor with the model."""
_SEGMENT = 1200
"""Bytes for what names a segment's part of a model, in each of its workers."""
_SUM = 250
"""Bytes for a sum of a tensor, from the kernel's to the text of journal and config."""

_MARGIN = 8 << 20
"""Bytes by which another run of the same command may begin with more."""


def workers_and_elements(job: Job, options: Options) -> tuple[int, int]:
    """How many workers fit into ``options.max_memory``, and how many elements each can take.

    Raises:
        ValueError: not even one worker with one chunk fits; the message says what would.
    """
    books = _SUM * (job.chunk_rows + 1) * len(job.numels)
    taken = resident() + _RESERVE + books
    segments = min(SEGMENTS, max(map(len, job.shards)))
    each = _SLACK + _SEGMENT * (job.chunk_rows + 4) * segments
    smallest = int(CHUNK * job.element_bytes) + each
    left = options.max_memory - taken
    if left < smallest:
        raise ValueError(
            f"max_memory: {options.max_memory >> 20} MiB are too few; this needs "
            f"{taken + smallest + _MARGIN >> 20} MiB"
        )
    workers = min(options.workers, left // smallest)
    elements = int((left / workers - each) / job.element_bytes) // CHUNK * CHUNK
    return workers, min(_BEST, elements)


def rooms(job: Job, options: Options, workers: int, elements: int) -> list[Room]:
    """One for each worker."""
    pin = torch.device(options.device).type == "cuda"
    size = int(elements * job.element_bytes) + _SLACK
    return [Room(size, pin=pin) for _ in range(workers)]


def resident() -> int:
    """Bytes of memory that are this process's own: mapped files are not counted."""
    try:
        text = Path("/proc/self/status").read_text()
    except OSError:  # not Linux: what the interpreter and torch take, as measured there
        return 320 << 20
    return sum(
        int(line.split()[1]) << 10 for line in text.splitlines() if line.startswith("RssAnon")
    )
