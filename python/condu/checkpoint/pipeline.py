"""Units through worker threads: done in any order, counted in theirs.

Each worker takes the next unit and does all of it, from reading to writing, in memory of its own:
so while one waits for a disk another computes, and memory does not depend on the model. What must
happen in order, such as checksums of files that are written in pieces, happens at a turnstile
behind it, through which the units pass one by one.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from functools import partial
from typing import Generic, TypeVar

from condu.checkpoint.room import Room
from condu.checkpoint.units import Unit

Outcome = TypeVar("Outcome")


class Pipeline(Generic[Outcome]):
    """A run of units.

    Args:
        process: does a unit in a room that belongs to its worker.
        passed: told of every unit in order, one at a time, while its room still holds it.
        check: called now and then; what it raises ends the run.
    """

    def __init__(
        self,
        units: Sequence[Unit],
        process: Callable[[Unit, Room], Outcome],
        passed: Callable[[Unit, Outcome], None],
        check: Callable[[], None],
    ) -> None:
        self._units, self._process, self._passed, self._check = units, process, passed, check
        self._next = self._turn = 0
        self._failure: BaseException | None = None
        self._moved = threading.Condition()

    def run(self, rooms: Sequence[Room]) -> None:
        """Do all units with one worker for each room.

        Raises:
            The first error of a unit; no unit is begun after it, and all workers have ended.
        """
        workers = [threading.Thread(target=self._work, args=(room,)) for room in rooms]
        try:
            for worker in workers:
                worker.start()
            for worker in workers:
                while worker.is_alive():
                    worker.join(0.2)
                    self._check()
        except BaseException as error:
            self._stop(error)
        for worker in workers:
            if worker.ident is not None:
                worker.join()
        if self._failure is not None:
            raise self._failure

    def _work(self, room: Room) -> None:
        try:
            while True:
                with self._moved:
                    if self._failure is not None or self._next == len(self._units):
                        return
                    number = self._next
                    self._next += 1
                room.clear()
                outcome = self._process(self._units[number], room)
                with self._moved:
                    self._moved.wait_for(partial(self._may_pass, number))
                    if self._failure is not None:
                        return
                self._passed(self._units[number], outcome)
                with self._moved:
                    self._turn += 1
                    self._moved.notify_all()
        except BaseException as error:
            self._stop(error)

    def _may_pass(self, number: int) -> bool:
        return self._turn == number or self._failure is not None

    def _stop(self, error: BaseException) -> None:
        with self._moved:
            self._failure = self._failure or error
            self._moved.notify_all()
