"""A job from its first byte to the last one before the commit, on one process or on several.

Every process does a run of units, of about as many elements as the others' (:mod:`.units`), through
a :mod:`.pipeline`. A shard that one process did alone is finished by it as soon as its last unit
has passed: synced, and noted in the journal. The few that processes share are finished when all are
done: their chunk sums are exchanged and added in chunk order, as one process adds them, and their
checksums are made by reading them once more.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor

from condu.checkpoint.costs import Costs
from condu.checkpoint.job import Job, Outcome
from condu.checkpoint.journal import Record
from condu.checkpoint.memory import rooms, workers_and_elements
from condu.checkpoint.options import Options
from condu.checkpoint.pipeline import Pipeline
from condu.checkpoint.room import Room
from condu.checkpoint.tally import Tally
from condu.checkpoint.target import NewFile, Target
from condu.checkpoint.units import Division, Unit
from condu.checkpoint.watch import OtherFailed, OtherGone
from condu.checkpoint.world import World

_UNSYNCED = 256
"""Files of complete shards that may wait for the disk, before units do."""


class Runner:
    """One process's part in a job."""

    def __init__(
        self, job: Job, target: Target, world: World, options: Options, more: int = 0
    ) -> None:
        """``more``: bytes that are written once the job is done."""
        self._more = more
        self._job, self._target, self._world, self._options = job, target, world, options
        self.costs = Costs()
        self._elements = max(sum(job.numels), 1)
        self._records: dict[int, Record] = {}
        self._tallies: dict[int, Tally] = {}
        self._syncs: deque[Future[None]] = deque()
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
                self._target.make_room((self._files(k) for k in rest), self._more)
        elements = min(step.all)  # all cut alike
        with self._world.step():
            self._division = Division(
                {k: self._job.shards[k] for k in rest},
                self._job.numels,
                elements,
                self._world.size,
            )
            self._target.begin(self._world.rank)
            memory = rooms(self._job, self._options, self.costs.workers, elements)
        self._options.progress(0, self._bytes_of(rest) // self._world.size)
        self._do_units(memory, begin)
        self._finish_shared()
        for records in self._world.gather(self._records):
            finished |= records
        return finished

    # ---- before --------------------------------------------------------------------------------

    def _finished_before(self) -> dict[int, Record]:
        """The shards of an earlier run whose files are intact; each is looked at by one process."""
        with self._world.step() as step:
            found = self._target.finished
            numbers = sorted(found)[self._world.rank :: self._world.size]
            step.mine = [k for k in numbers if self._intact(k, found[k])]
        intact = {k: found[k] for good in step.all for k in good}
        if intact and self._world.leads:
            self._options.report(
                f"{len(intact)} of {len(self._job.shards)} shards were finished by an earlier run"
            )
        return intact

    def _intact(self, k: int, record: Record) -> bool:
        if not 0 <= k < len(self._job.shards):
            return False
        sizes = {file.name: file.size for file in self._files(k)}
        fits = record.fits(sizes, self._job.chunk_rows, len(self._job.shards[k]))
        return fits and self._target.intact(record)

    def _files(self, k: int) -> list[NewFile]:
        return self._job.files(k, self._target.generation)

    def _bytes_of(self, shards: Sequence[int]) -> int:
        """Bytes to read and to write for some shards."""
        parts = sum(self._job.numels[t] for k in shards for t in self._job.shards[k])
        written = sum(file.size for k in shards for file in self._files(k))
        return self._reads(parts) + written

    def _reads(self, elements: int) -> int:
        """Bytes to read for some elements, on the average."""
        return self._job.reads * elements // self._elements

    # ---- units ---------------------------------------------------------------------------------

    def _do_units(self, memory: Sequence[Room], begin: float) -> None:
        """All units of this process, and the shards that it does alone."""
        failure: Exception | None = None
        units = self._division.units(self._world.rank)
        try:
            Pipeline(units, self._process, self._passed, self._world.check_others).run(memory)
            self.costs.elapsed = time.perf_counter() - begin
            while self._syncs:
                self._syncs.popleft().result()
            self.costs.waited = time.perf_counter() - begin - self.costs.elapsed
        except OtherFailed:
            pass  # says in the step below what is wrong
        except OtherGone:
            raise  # takes no step any more
        except Exception as error:
            self._world.fail()
            failure = error
        finally:
            self._syncer.shutdown(cancel_futures=True)
        with self._world.step():
            if failure is not None:
                raise failure

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
                for new in self._files(unit.shard):
                    self._target.write(new.name, 0, new.header)
        read = self._reads(unit.elements)
        written = sum(len(data) for _, _, data in outcome.written)
        costs.moved(read, written)
        self._options.progress(read + written, 0)
        return outcome

    def _passed(self, unit: Unit, outcome: Outcome) -> None:
        k = unit.shard
        tally = self._tallies.get(k) or self._tallies.setdefault(k, self._new_tally(k))
        with self.costs.of("check"):
            tally.add(unit, outcome)
        if tally.whole and tally.complete:
            del self._tallies[k]
            record = tally.record()  # now, for it is small beside all that it comes from
            self._syncs.append(self._syncer.submit(self._finish, k, record))
            while len(self._syncs) * len(record.files) > _UNSYNCED:
                self._syncs.popleft().result()
        while self._syncs and self._syncs[0].done():  # a disk that fails ends the run at once
            self._syncs.popleft().result()

    def _new_tally(self, k: int) -> Tally:
        owners, own = self._division.owners(k), self._division.count(self._world.rank, k)
        return Tally(self._job, k, self._files(k), own, whole=len(owners) == 1)

    # ---- shards --------------------------------------------------------------------------------

    def _finish(self, k: int, record: Record) -> None:
        """A shard that this process did alone is complete."""
        with self.costs.of("sync"):
            self._target.settle(record.files)
        self._note(k, record)

    def _finish_shared(self) -> None:
        """Complete the shards of which several processes did a part."""
        with self._world.step() as step:
            for tally in self._tallies.values():
                self._target.settle(file.name for file in tally.files)
            step.mine = {k: tally.part() for k, tally in self._tallies.items()}
        with self._world.step():
            for k, tally in self._tallies.items():
                if self._division.owners(k)[0] == self._world.rank:
                    parts = [parts[k] for parts in step.all if k in parts]
                    self._note(k, tally.joined(parts, self._target.fingerprint))

    def _note(self, k: int, record: Record) -> None:
        self._target.note(k, record)
        self._records[k] = record
