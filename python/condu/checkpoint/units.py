"""Work in small pieces: ranges of tensors that are read, fused and written at a time.

A *shard* is a group of output files that are cut alike and hold whole tensors. A *unit* is a list
of *segments*, ranges of a shard's tensors, cut where the chunks of the sums are (64 Ki elements),
so that how a model is cut changes no result.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from condu_ext.layout import ALIGN, CHUNK, chunk_count


@dataclass(frozen=True)
class Segment:
    """Elements [start, stop) of a tensor, by its position in the job's list."""

    tensor: int
    start: int
    stop: int

    @property
    def numel(self) -> int:
        return self.stop - self.start


@dataclass(frozen=True)
class Unit:
    """What one worker does at a time; ``chunk`` is the number in its shard of the first chunk."""

    shard: int
    chunk: int
    segments: tuple[Segment, ...]

    @property
    def numels(self) -> list[int]:
        return [segment.numel for segment in self.segments]

    @property
    def elements(self) -> int:
        return sum(self.numels)


def padded(numel: int) -> int:
    """Elements that a range takes in an arena."""
    return -(-numel // ALIGN) * ALIGN


def cut(shard: int, tensors: Sequence[int], numels: Sequence[int], room: int) -> Iterator[Unit]:
    """The units of a shard, of at most ``room`` elements each in an arena (one chunk at least).

    ``numels`` are those of all tensors of the job, ``tensors`` the positions of the shard's. There
    is one unit at least, for a shard without elements has files too.
    """
    room = max(CHUNK, room // CHUNK * CHUNK)
    segments: list[Segment] = []
    first = filled = 0
    for tensor in tensors:
        start = 0
        while start < numels[tensor]:
            left = numels[tensor] - start
            if filled == room or (filled and padded(min(left, CHUNK)) > room - filled):
                yield Unit(shard, first, tuple(segments))
                first += chunk_count(s.numel for s in segments)
                segments, filled = [], 0
            fits = room - filled
            size = left if padded(left) <= fits else fits // CHUNK * CHUNK
            segments.append(Segment(tensor, start, start + size))
            start, filled = start + size, filled + padded(size)
    yield Unit(shard, first, tuple(segments))


def share(units: Sequence[Unit], processes: int) -> list[range]:
    """Which units each process does: runs of about as many elements."""
    total = sum(unit.elements for unit in units)
    ends: list[int] = []
    done = 0
    for number, unit in enumerate(units, start=1):
        done += unit.elements
        while len(ends) < processes - 1 and done * processes >= total * (len(ends) + 1):
            ends.append(number)
    ends += [len(units)] * (processes - len(ends))
    return [range(start, end) for start, end in zip([0, *ends], ends, strict=False)]
