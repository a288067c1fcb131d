"""A job from its first byte to the last one before the commit, on one process or on several.

Every process does a run of units, of about as many bytes as the others' (:mod:`.units`), through a
:mod:`.pipeline`. A shard that one process did alone is finished by it as soon as its last unit has
passed: synced, and noted in the journal. The few that two processes share are finished when all are
done: their chunk sums are exchanged and added in chunk order, as one process adds them, and their
checksums are made by reading them once more.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
import xxhash
from numpy.typing import NDArray

from condu.checkpoint.job import Costs, Job, Outcome
from condu.checkpoint.journal import Record
from condu.checkpoint.memory import rooms, workers_and_elements
from condu.checkpoint.options import Options
from condu.checkpoint.pipeline import Pipeline
from condu.checkpoint.room import Room
from condu.checkpoint.target import Target
from condu.checkpoint.units import Unit, cut, share
from condu.checkpoint.world import World
from condu_ext.layout import chunk_count
from condu_ext.ranges import add_chunks


@dataclass
class _Progress:
    """A shard while its units pass through this process.

    Attributes:
        left: units of it that this process still has to do.
        whole: whether they are all of its units.
        sums: float64 [rows, chunks of the shard].
        zero_sums: by tensor.
        digests: xxh3 of each file so far.
        base: by tensor the xxh3 of the base's bytes, and up to which element.
    """

    left: int
    whole: bool
    sums: NDArray[np.float64]
    zero_sums: dict[int, int]
    digests: dict[str, xxhash.xxh3_64] = field(default_factory=dict)
    base: dict[int, tuple[xxhash.xxh3_64, int]] = field(default_factory=dict)
    chunks: list[tuple[int, int]] = field(default_factory=list)


class Runner:
    """One process's part in a job."""

    def __init__(self, job: Job, target: Target, world: World, options: Options) -> None:
        self._job, self._target, self._world, self._options = job, target, world, options
        self.costs = Costs()
        self._records: dict[int, Record] = {}
        self._shards: dict[int, _Progress] = {}
        self._syncs: list[Future[None]] = []
        self._syncer = ThreadPoolExecutor(1)

    def run(self) -> dict[int, Record]:
        """Do this process's part, and return what there is to say of every shard.

        Raises:
            ValueError: NaN or infinite values, another base model, too little memory.
            OSError: a file cannot be read or written, or the disk is full.
            RuntimeError: another process failed.
        """
        begin = time.perf_counter()
        finished = self._finished_before()
        rest = [k for k in range(len(self._job.shards)) if k not in finished]
        with self._world.step() as step:
            self.costs.workers, step.mine = workers_and_elements(self._job, self._options)
            if self._world.leads:
                files = {k: self._job.files(k, self._target.generation) for k in rest}
                self._target.check_room(files)
        elements = min(step.all)  # all cut alike
        units = [u for k in rest for u in cut(k, self._job.shards[k], self._job.numels, elements)]
        shares = share(units, self._world.size)
        first_rank = {
            units[n].shard: rank for rank, own in reversed([*enumerate(shares)]) for n in own
        }
        mine = [units[n] for n in shares[self._world.rank]]
        self._prepare(Counter(unit.shard for unit in units), Counter(unit.shard for unit in mine))
        memory = rooms(self._job, self._options, self.costs.workers, elements)
        self._options.progress(0, self._bytes_of(rest) // self._world.size)
        with self._stopping_others(), self._world.step():
            try:
                Pipeline(mine, self._process, self._passed, self._check).run(memory)
                self.costs.elapsed = time.perf_counter() - begin
                for sync in self._syncs:
                    sync.result()
            finally:
                self._syncer.shutdown(cancel_futures=True)
            self.costs.waited = time.perf_counter() - begin - self.costs.elapsed
        self._finish_shared(first_rank)
        for records in self._world.gather(self._records):
            finished |= records
        return finished

    # ---- before --------------------------------------------------------------------------------

    def _finished_before(self) -> dict[int, Record]:
        """The shards of an earlier run whose files are intact; each is looked at by one process."""
        with self._world.step() as step:
            found = self._target.finished
            numbers = sorted(found)[self._world.rank :: self._world.size]
            step.mine = [k for k in numbers if self._target.intact(found[k])]
        intact = {k: found[k] for good in step.all for k in good}
        if intact and self._world.leads:
            self._options.report(
                f"{len(intact)} of {len(self._job.shards)} shards were finished by an earlier run"
            )
        return intact

    def _prepare(self, units: Counter[int], mine: Counter[int]) -> None:
        self._target.begin(self._world.rank)
        for k, own in mine.items():
            numels = [self._job.numels[t] for t in self._job.shards[k]]
            sums = np.zeros((self._job.chunk_rows, chunk_count(numels)))
            zero_sums = dict.fromkeys(self._job.shards[k], 0)
            self._shards[k] = _Progress(own, own == units[k], sums, zero_sums)

    def _bytes_of(self, shards: Sequence[int]) -> int:
        """Bytes to read and to write for some shards."""
        job = self._job
        parts = sum(job.numels[t] for k in shards for t in job.shards[k])
        reads = job.reads * parts // max(sum(job.numels), 1)
        return reads + sum(f.size for k in shards for f in job.files(k, self._target.generation))

    @contextmanager
    def _stopping_others(self) -> Iterator[None]:
        try:
            yield
        except BaseException:
            self._world.fail()
            raise

    # ---- units ---------------------------------------------------------------------------------

    def _process(self, unit: Unit, room: Room) -> Outcome:
        costs = self.costs
        with costs.of("read"):
            inputs = self._job.read(unit, room)
        with costs.of("fuse"):
            outcome = self._job.fuse(unit, inputs, room, self._target.generation)
        with costs.of("write"):
            for file, offset, data in outcome.written:
                self._target.write(file, offset, data)
            if unit.chunk == 0:
                for new in self._job.files(unit.shard, self._target.generation):
                    self._target.write(new.name, 0, new.header)
        read = self._job.reads * unit.elements // max(sum(self._job.numels), 1)
        written = sum(len(data) for _, _, data in outcome.written)
        costs.moved(read, written)
        self._options.progress(read + written, 0)
        return outcome

    def _passed(self, unit: Unit, outcome: Outcome) -> None:
        shard = self._shards[unit.shard]
        with self.costs.of("check"):
            if shard.whole:
                if not shard.digests:
                    for new in self._job.files(unit.shard, self._target.generation):
                        shard.digests[new.name] = xxhash.xxh3_64(new.header)
                for file, _, data in outcome.written:
                    shard.digests[file].update(data)
            for segment, data in zip(unit.segments, outcome.base, strict=False):
                digest, done = shard.base.get(segment.tensor, (xxhash.xxh3_64(), 0))
                if done == segment.start:
                    digest.update(data)
                    shard.base[segment.tensor] = digest, segment.stop
                    if segment.stop == self._job.numels[segment.tensor]:
                        self._job.check_base(segment.tensor, digest.hexdigest())
        if outcome.sums is not None:
            chunks = outcome.sums.shape[1]
            shard.sums[:, unit.chunk : unit.chunk + chunks] = outcome.sums.numpy()
            shard.chunks.append((unit.chunk, unit.chunk + chunks))
        for segment, count in zip(unit.segments, outcome.zero_sums, strict=False):
            shard.zero_sums[segment.tensor] += count
        shard.left -= 1
        if shard.whole and not shard.left:
            self._syncs.append(self._syncer.submit(self._finish, unit.shard, shard))

    def _check(self) -> None:
        self._world.check_others()
        for sync in self._syncs:
            if sync.done():
                sync.result()

    # ---- shards --------------------------------------------------------------------------------

    def _finish(self, k: int, shard: _Progress) -> None:
        """A shard that this process did alone is complete."""
        names = [file.name for file in self._job.files(k, self._target.generation)]
        with self.costs.of("sync"):
            self._target.settle(names)
        digits = {name: shard.digests[name].hexdigest() for name in names}
        base = {t: digest.hexdigest() for t, (digest, _) in shard.base.items()}
        self._note(k, self._record(k, digits, shard.sums, shard.zero_sums, base))

    def _finish_shared(self, first_rank: dict[int, int]) -> None:
        """Complete the shards of which several processes did a part."""
        shared = {k: shard for k, shard in self._shards.items() if not shard.whole}
        with self._stopping_others(), self._world.step() as step:
            for k in shared:
                self._target.settle([f.name for f in self._job.files(k, self._target.generation)])
            complete = {
                k: {
                    t: digest.hexdigest()
                    for t, (digest, done) in shard.base.items()
                    if done == self._job.numels[t]
                }
                for k, shard in shared.items()
            }
            step.mine = {
                k: (
                    [(first, shard.sums[:, first:end]) for first, end in shard.chunks],
                    shard.zero_sums,
                    complete[k],
                )
                for k, shard in shared.items()
            }
        with self._stopping_others(), self._world.step():
            for k in shared:
                if first_rank[k] == self._world.rank:
                    self._join(k, [parts[k] for parts in step.all if k in parts])

    def _join(self, k: int, parts: Sequence[tuple[Any, ...]]) -> None:
        shard = self._shards[k]
        zero_sums = dict.fromkeys(shard.zero_sums, 0)
        base: dict[int, str] = {}
        for pieces, counts, complete in parts:
            for first, piece in pieces:
                shard.sums[:, first : first + piece.shape[1]] = piece
            for tensor, count in counts.items():
                zero_sums[tensor] += count
            base |= complete
        if self._job.has_base:
            for tensor in self._job.shards[k]:
                if tensor not in base:
                    base[tensor] = self._job.base_fingerprint(tensor)
                    self._job.check_base(tensor, base[tensor])
        names = [file.name for file in self._job.files(k, self._target.generation)]
        digits = {name: self._target.fingerprint(name) for name in names}
        self._note(k, self._record(k, digits, shard.sums, zero_sums, base))

    def _record(
        self,
        k: int,
        digits: dict[str, str],
        sums: NDArray[np.float64],
        zero_sums: dict[int, int],
        base: dict[int, str],
    ) -> Record:
        tensors = self._job.shards[k]
        files = self._job.files(k, self._target.generation)
        totals = add_chunks([self._job.numels[t] for t in tensors], torch.from_numpy(sums))
        return Record(
            files={file.name: {"size": file.size, "xxh3": digits[file.name]} for file in files},
            sums=totals.tolist(),
            zero_sums=[zero_sums[t] for t in tensors],
            base=[base.get(t, "") for t in tensors],
        )

    def _note(self, k: int, record: Record) -> None:
        self._target.note(k, record)
        self._records[k] = record
