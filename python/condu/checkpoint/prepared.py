"""A checked command that is ready to run: what ``plan`` describes and what the others do."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
import xxhash

from condu.checkpoint.costs import Costs
from condu.checkpoint.job import Job
from condu.checkpoint.journal import Record
from condu.checkpoint.options import Options
from condu.checkpoint.runner import Runner
from condu.checkpoint.sources import Source
from condu.checkpoint.state_files import StateFiles
from condu.checkpoint.target import Target
from condu.checkpoint.world import World
from condu_ext import _C

Records = Mapping[int, Record]


class Commit(Protocol):
    """What makes the shards of a command count, once all of them are on disk."""

    def __call__(self, target: Target, records: Records) -> None: ...

    def others(self, generation: int) -> Mapping[str, int]:
        """Files that it writes itself, and their sizes."""


@dataclass
class Prepared:
    """A command whose arguments were checked and whose inputs are open; nothing is written yet.

    Attributes:
        folder: where files are written.
        identity: everything that the result depends on; a run that was killed is continued by one
            with the same.
        stale: called on the process that leads, once it has claimed the folder: looks whether what
            was checked still holds, and names the files there that another run may have left.
        commit: called there when all shards are on disk: makes them count.
        sources: the models that are read.
        states: those that are read; their checksums are compared before anything is written.
        temporary: whether the folder is one that the commit renames.
        other_dtype: of a new state, the other dtype that it could have, and its bytes with it.
        held: closes the inputs.
    """

    job: Job
    folder: Path
    identity: dict[str, Any]
    stale: Callable[[Target], Iterable[str]]
    commit: Commit
    world: World
    options: Options
    sources: Sequence[Source] = ()
    states: Sequence[StateFiles] = ()
    temporary: bool = False
    other_dtype: tuple[torch.dtype, int] | None = None
    held: ExitStack = field(default_factory=ExitStack)

    def run(self) -> Costs:
        """Do it. Collective, if there are several processes.

        Raises:
            ValueError: NaN or infinite values, another base model, too little memory: everything
                that was written is removed.
            OSError, RuntimeError: a disk that is full or fails, another process that failed or is
                writing there: finished shards stay, and the same command goes on from there.
        """
        target = Target(self.folder, self._digest(), temporary=self.temporary)
        runner = Runner(self.job, target, self.world, self.options, self.copied)
        try:
            with self.world:
                try:
                    with self.world.step(), runner.costs.of("verify"):
                        self._check_states(runner.costs)
                    with self.world.step() as step:
                        if self.world.leads:
                            target.claim()
                            target.start_anew(self.stale(target))
                            step.mine = target.mark(), target.generation, target.finished
                    mark, target.generation, target.finished = step.all[0]
                    with self.world.step():
                        target.find(mark)
                    records = runner.run()
                    costs = Costs.together(self.world.gather(runner.costs))
                    with self.world.step():
                        if self.world.leads:
                            target.check_whole(records.values())
                            self.commit(target, records)
                            costs.moved(self.copied, self.copied)
                except BaseException as error:
                    with suppress(OSError):  # the error that is on its way comes first
                        self._clean_up(target, error)
                    raise
        finally:
            target.close()
        return costs

    @property
    def copied(self) -> int:
        """Bytes that the commit copies: of private tensors, or of files beside a model."""
        return sum(self.commit.others(0).values())

    def _check_states(self, costs: Costs) -> None:
        """Checksums of all files of the states, each looked at by one process."""
        for state in self.states:
            state.check_sums(lambda number: number % self.world.size == self.world.rank)
            costs.verified += state.data_bytes

    def _clean_up(self, target: Target, error: BaseException) -> None:
        """After an error; what is finished stays where the same command may yet succeed."""
        if not target.claimed:
            return
        may_go_on = isinstance(error, (OSError, RuntimeError)) or not isinstance(error, Exception)
        if may_go_on and target.has_finished:
            self.options.report(
                f"what is finished stays in {self.folder}: the same command goes on from there"
            )
        else:
            names = self._names(target.generation)
            target.abandon([*names, *self.commit.others(target.generation)])

    def _names(self, generation: int) -> Iterator[str]:
        for k in range(len(self.job.shards)):
            yield from (file.name for file in self.job.files(k, generation))

    def _digest(self) -> str:
        text = json.dumps({"version": _C.version, **self.identity}, sort_keys=True)
        return xxhash.xxh3_64_hexdigest(text.encode())

    def __enter__(self) -> Prepared:
        return self

    def __exit__(self, *_: object) -> None:
        self.held.close()
