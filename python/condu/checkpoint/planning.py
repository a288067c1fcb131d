"""What a command would read, write and take, without doing it."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path

import torch

from condu.checkpoint.costs import size_text
from condu.checkpoint.memory import resident, rooms, workers_and_elements
from condu.checkpoint.prepared import Prepared
from condu.checkpoint.room import Room
from condu.checkpoint.units import Unit, cut

_SAMPLE_SECONDS = 1.0
_SAMPLE_BYTES = 16 << 20
_MEASURE_BYTES = 8 << 20


@dataclass(frozen=True)
class Plan:
    """What a command will need; sizes in bytes, times in seconds.

    Attributes:
        read, written: bytes of data files; ``written`` is what the disk must have free, too.
        staged: bytes of the models that are copied first and removed at the end, for all processes:
            part of ``read``, and for that time on disk besides ``written``.
        memory: the most that the process takes, pages of mapped files apart.
        workers: threads, each with a unit of ``unit`` elements.
        fuse_rate: elements that all workers read and fuse in a second, measured on a sample; None
            where a model would have to be copied for that.
        write_rate: bytes that one worker writes in a second, measured in the target's folder; None
            where nothing can be written.
        missing: bytes that the disk lacks.
        seconds: expected, with the disk's waiting; None as ``fuse_rate``.
        other_dtype: the other dtype that the state could have, and the bytes it would have then;
            None where no new state is made.
    """

    read: int
    written: int
    staged: int
    memory: int
    workers: int
    unit: int
    fuse_rate: float | None
    write_rate: float | None
    missing: int
    seconds: float | None
    other_dtype: tuple[torch.dtype, int] | None = None

    def lines(self) -> list[str]:
        """For a terminal."""
        lacks = f"; it lacks {size_text(self.missing)}" if self.missing else ""
        writing = "writing is not measured"
        if self.write_rate is not None:
            writing = f"{size_text(self.write_rate)}/s written"
        found = [
            f"to read           {size_text(self.read)}",
            f"to write          {size_text(self.written)}, which the disk must have free{lacks}",
        ]
        if self.staged:
            found.append(
                f"to copy before    {size_text(self.staged)}, on disk besides until the end"
            )
        found.append(
            f"memory, at most   {self.memory / 2**20:.0f} MiB: {self.workers} workers with units "
            f"of {self.unit / 1024:.0f} Ki elements"
        )
        if self.fuse_rate is None or self.seconds is None:
            found.append(f"expected time     not measured before the copy; {writing}")
        else:
            found.append(
                f"expected time     {self.seconds:.1f} s: {self.fuse_rate / 1e6:.0f} M parameters/"
                f"s are read and fused here, {writing}"
            )
        if self.other_dtype is not None:
            dtype, size = self.other_dtype
            name = "bf16" if dtype == torch.bfloat16 else "fp32"
            found.append(f"--state-dtype {name} would write {size_text(size)}")
        return found


def plan(prepared: Prepared) -> Plan:
    """Look at a prepared command: sizes from headers, rates from a sample of its own work and from
    a file of 16 MiB that is written beside the target and removed.

    Raises:
        ValueError: NaN or infinite values in the sample, or too little memory.
        OSError: a file cannot be read.
    """
    job, options = prepared.job, prepared.options
    workers, elements = workers_and_elements(job, options)
    (room,) = rooms(job, options, 1, elements)
    memory = resident() + (workers - 1) * room.size
    verified = sum(state.data_bytes for state in prepared.states)
    staged = prepared.world.size * sum(source.staged for source in prepared.sources)
    place = next(p for p in (prepared.folder, *prepared.folder.parents) if p.is_dir())
    try:
        write_rate = _write_rate(place)
    except OSError as error:
        options.report(f"{place}: {error.strerror}, so how fast it writes is not known")
        write_rate = None
    written = sum(f.size for k in range(len(job.shards)) for f in job.files(k, 1))
    written += prepared.copied
    fuse_rate = seconds = None
    if not staged:
        cores = min(workers, torch.get_num_threads())
        fuse_rate, read_rate = (
            max(cores * rate, 1e-9) for rate in _rates(prepared, room, elements)
        )
        seconds = sum(job.numels) / fuse_rate + verified / read_rate
        seconds += written / write_rate if write_rate else 0
    return Plan(
        read=job.reads + prepared.copied + verified + staged,
        written=written,
        staged=staged,
        memory=max(memory, resident() + max((s.largest_part for s in prepared.sources), default=0)),
        workers=workers,
        unit=elements,
        fuse_rate=fuse_rate,
        write_rate=write_rate,
        missing=max(0, written + staged - shutil.disk_usage(place).free),
        seconds=seconds,
        other_dtype=prepared.other_dtype,
    )


def _rates(prepared: Prepared, room: Room, elements: int) -> tuple[float, float]:
    """Elements that one worker reads and fuses in a second, and bytes that it reads."""
    job = prepared.job
    done, reading, fusing = 0, 1e-9, 0.0
    for unit in _sample(prepared, elements):
        room.clear()
        begin = time.perf_counter()
        inputs = job.read(unit, room)
        middle = time.perf_counter()
        job.fuse(unit, inputs, room, 1)
        reading, fusing = reading + middle - begin, fusing + time.perf_counter() - middle
        done += unit.elements
        if reading + fusing > _SAMPLE_SECONDS:
            break
    read = job.reads * done / max(sum(job.numels), 1)
    return done / (reading + fusing), read / reading


def _sample(prepared: Prepared, elements: int) -> Iterator[Unit]:
    """The first units of every shard in turn."""
    job = prepared.job
    shards = [cut(k, job.shards[k], job.numels, elements) for k in range(len(job.shards))]
    for units in zip_longest(*shards):
        yield from (unit for unit in units if unit is not None)


def _write_rate(place: Path) -> float:
    """Bytes a second of a file in a folder, on disk."""
    file = place / f".condu-plan-{os.getpid()}"
    data = os.urandom(_MEASURE_BYTES)
    try:
        begin = time.perf_counter()
        with open(file, "wb") as stream:
            for _ in range(_SAMPLE_BYTES // _MEASURE_BYTES):
                stream.write(data)
            stream.flush()
            os.fsync(stream.fileno())
        return _SAMPLE_BYTES / (time.perf_counter() - begin)
    finally:
        file.unlink(missing_ok=True)
