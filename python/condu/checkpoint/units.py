"""Work in small pieces: ranges of tensors that are read, fused and written at a time.

A *shard* is a group of output files that are cut alike and hold whole tensors. A *unit* is a list
of *segments*, ranges of a shard's tensors, cut where the chunks of the sums are (64 Ki elements),
so that how a model is cut changes no result.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice

from condu_ext.layout import ALIGN, CHUNK, chunk_count, offsets

SEGMENTS = 64
"""Segments of a unit, at most: each takes memory beside its elements, in every model."""


@dataclass(frozen=True, slots=True)
class Segment:
    """Elements [start, stop) of a tensor, by its position in the job's list."""

    tensor: int
    start: int
    stop: int

    @property
    def numel(self) -> int:
        return self.stop - self.start

    def bits(self, at: int) -> slice:
        """The bytes of a plane that hold its bits, where it begins at element ``at``."""
        return slice(at // 8, at // 8 + (self.numel + 7) // 8)


@dataclass(frozen=True, slots=True)
class Unit:
    """What one worker does at a time; ``chunk`` is the number in its shard of the first chunk."""

    shard: int
    chunk: int
    segments: tuple[Segment, ...]

    @property
    def numels(self) -> list[int]:
        return [segment.numel for segment in self.segments]

    @property
    def placed(self) -> list[tuple[Segment, int]]:
        """The segments, and the element of an arena of them at which each begins."""
        return list(zip(self.segments, offsets(self.numels)[0], strict=True))

    @property
    def elements(self) -> int:
        return sum(self.numels)


def padded(numel: int) -> int:
    """Elements that a range takes in an arena."""
    return -(-numel // ALIGN) * ALIGN


def cut(shard: int, tensors: Sequence[int], numels: Sequence[int], room: int) -> Iterator[Unit]:
    """The units of a shard, of at most ``room`` elements each in an arena (one chunk at least) and
    at most SEGMENTS segments.

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
            if (
                filled == room
                or len(segments) == SEGMENTS
                or (filled and padded(min(left, CHUNK)) > room - filled)
            ):
                yield Unit(shard, first, tuple(segments))
                first += chunk_count(s.numel for s in segments)
                segments, filled = [], 0
            fits = room - filled
            size = left if padded(left) <= fits else fits // CHUNK * CHUNK
            segments.append(Segment(tensor, start, start + size))
            start, filled = start + size, filled + padded(size)
    yield Unit(shard, first, tuple(segments))


class Division:
    """The units of some shards, and how processes share them: runs of about as many elements.

    Units are cut when they are asked for and never kept: large models have hundreds of thousands.

    Args:
        shards: number of a shard → positions of its tensors, in the order in which they are done.
        numels, room: as for :func:`cut`.
    """

    def __init__(
        self,
        shards: Mapping[int, Sequence[int]],
        numels: Sequence[int],
        room: int,
        processes: int = 1,
    ) -> None:
        self._shards, self._numels, self._room = shards, numels, room
        self._units: dict[int, range] = {}  # of each shard, counted over all of them
        sizes = array("q")
        for shard in shards:
            first = len(sizes)
            sizes.extend(unit.elements for unit in self._cut(shard))
            self._units[shard] = range(first, len(sizes))
        self._shares = _shares(sizes, processes)

    def units(self, process: int) -> Iterator[Unit]:
        """What a process does, in order."""
        share = self._shares[process]
        for shard, own in self._units.items():
            begin, end = max(share.start, own.start), min(share.stop, own.stop)
            yield from islice(self._cut(shard), max(begin - own.start, 0), max(end - own.start, 0))

    def count(self, process: int, shard: int) -> int:
        """How many units of a shard a process does."""
        share, own = self._shares[process], self._units[shard]
        return max(0, min(share.stop, own.stop) - max(share.start, own.start))

    def owners(self, shard: int) -> list[int]:
        """The processes that do units of a shard, in the order of its units."""
        return [p for p in range(len(self._shares)) if self.count(p, shard)]

    def _cut(self, shard: int) -> Iterator[Unit]:
        return cut(shard, self._shards[shard], self._numels, self._room)


def _shares(sizes: Sequence[int], processes: int) -> list[range]:
    """Numbers of the units of each process."""
    total, done = sum(sizes), 0
    ends: list[int] = []
    for number, size in enumerate(sizes, start=1):
        done += size
        while len(ends) < processes - 1 and done * processes >= total * (len(ends) + 1):
            ends.append(number)
    ends += [len(sizes)] * (processes - len(ends))
    return [range(start, end) for start, end in zip([0, *ends], ends, strict=False)]
