"""What is counted of a shard while its units pass: chunk sums, checksums, fingerprints of the base.

A process that does a whole shard ends with all of it. Of a shard that several processes share each
has a part; one of them joins the parts, so that chunk sums are added in chunk order as one process
adds them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
import xxhash
from numpy.typing import NDArray

from condu.checkpoint.job import Job, Outcome
from condu.checkpoint.journal import Record
from condu.checkpoint.target import NewFile
from condu.checkpoint.units import Unit
from condu_ext.layout import chunk_count
from condu_ext.ranges import add_chunks


@dataclass
class Part:
    """What one of several processes counted of a shard.

    Attributes:
        sums: number of a first chunk in the shard, and the sums from there on, float64 [rows, n].
        zero_sums: by tensor.
        base: fingerprints of those of the base's tensors that this process read whole.
    """

    sums: list[tuple[int, NDArray[np.float64]]] = field(default_factory=list)
    zero_sums: dict[int, int] = field(default_factory=dict)
    base: dict[int, str] = field(default_factory=dict)


class Tally:
    """Counts a shard's units, which pass in order.

    Args:
        files: those of the shard.
        units: how many of them will pass here.
        whole: whether these are all.
    """

    def __init__(
        self, job: Job, shard: int, files: Sequence[NewFile], units: int, whole: bool
    ) -> None:
        self._job, self._tensors = job, job.shards[shard]
        self.files, self.whole = files, whole
        self._left = units
        self._part = Part(zero_sums=dict.fromkeys(self._tensors, 0))
        self._reading: dict[int, tuple[xxhash.xxh3_64, int]] = {}
        self._digests = {file.name: xxhash.xxh3_64(file.header) for file in files if whole}

    @property
    def complete(self) -> bool:
        """Whether all units have passed."""
        return not self._left

    def add(self, unit: Unit, outcome: Outcome) -> None:
        """Count a unit.

        Raises:
            ValueError: a tensor of the base, complete with this unit, is not the state's.
        """
        if self.whole:
            for file, _, data in outcome.written:
                self._digests[file].update(data)
        for segment, data in zip(unit.segments, outcome.base, strict=False):
            digest, done = self._reading.pop(segment.tensor, (xxhash.xxh3_64(), 0))
            if done != segment.start:  # another process has the tensor's beginning
                continue
            digest.update(data)
            if segment.stop == self._job.numels[segment.tensor]:
                self._part.base[segment.tensor] = digest.hexdigest()
                self._job.check_base(segment.tensor, digest.hexdigest())
            else:
                self._reading[segment.tensor] = digest, segment.stop
        if outcome.sums is not None:
            self._part.sums.append((unit.chunk, outcome.sums.numpy()))
        for segment, count in zip(unit.segments, outcome.zero_sums, strict=False):
            self._part.zero_sums[segment.tensor] += count
        self._left -= 1

    def part(self) -> Part:
        """For the process that joins the parts."""
        return self._part

    def record(self) -> Record:
        """Of a shard all of whose units passed here."""
        digits = {name: digest.hexdigest() for name, digest in self._digests.items()}
        return self._record([self._part], digits)

    def joined(self, parts: Iterable[Part], fingerprint: Callable[[str], str]) -> Record:
        """Of a shard that several processes did.

        Args:
            parts: of all of them.
            fingerprint: xxh3 of a file by name.

        Raises:
            ValueError: a tensor of the base is not the state's.
        """
        return self._record(parts, {file.name: fingerprint(file.name) for file in self.files})

    def _record(self, parts: Iterable[Part], digits: dict[str, str]) -> Record:
        numels = [self._job.numels[t] for t in self._tensors]
        sums = np.zeros((self._job.chunk_rows, chunk_count(numels)))
        zero_sums = dict.fromkeys(self._tensors, 0)
        base: dict[int, str] = {}
        for part in parts:
            for first, piece in part.sums:
                sums[:, first : first + piece.shape[1]] = piece
            for tensor, count in part.zero_sums.items():
                zero_sums[tensor] += count
            base |= part.base
        for tensor in self._tensors if self._job.has_base else ():
            if tensor not in base:  # cut between processes, or without elements
                base[tensor] = self._job.base_fingerprint(tensor)
                self._job.check_base(tensor, base[tensor])
        return Record(
            files={f.name: {"size": f.size, "xxh3": digits[f.name]} for f in self.files},
            sums=add_chunks(numels, torch.from_numpy(sums)).tolist(),
            zero_sums=[zero_sums[t] for t in self._tensors],
            base=[base.get(t, "") for t in self._tensors],
        )
