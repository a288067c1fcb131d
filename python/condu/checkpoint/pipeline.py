"""Units through worker threads: done in any order, counted in theirs.

Each worker takes the next unit and does all of it, from reading to writing, in memory of its own:
so while one waits for a disk another computes, and memory does not depend on the model. What must
happen in order, such as checksums of files that are written in pieces, happens at a turnstile
behind it, through which the units pass one by one.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Generic, TypeVar

from condu.checkpoint.room import Room
from condu.checkpoint.units import Unit

Outcome = TypeVar("Outcome")

_LOOK = 0.2  # seconds between two calls of ``check``


class Pipeline(Generic[Outcome]):
    """A run of units.

    Args:
        process: does a unit in a room that belongs to its worker.
        passed: told of every unit in order, one at a time, while its room still holds it.
        check: called now and then; what it raises ends the run.
    """

    def __init__(
        self,
        units: Iterable[Unit],
        process: Callable[[Unit, Room], Outcome],
        passed: Callable[[Unit, Outcome], None],
        check: Callable[[], None],
    ) -> None:
        self._process, self._passed, self._check = process, passed, check
        self._numbered = enumerate(units)
        self._turn = 0
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
                    worker.join(_LOOK)
                    self._check()
        except BaseException as error:
            self._stop(error)
        while any(worker.is_alive() for worker in workers):
            try:
                for worker in filter(threading.Thread.is_alive, workers):
                    worker.join()
            except KeyboardInterrupt as error:  # not before they stopped writing
                self._stop(error)
        if self._failure is not None:
            raise self._failure

    def _work(self, room: Room) -> None:
        try:
            while True:
                with self._moved:
                    number, unit = next(self._numbered, (0, None))
                if unit is None or self._failure is not None:
                    return
                room.clear()
                outcome = self._process(unit, room)
                with self._moved:
                    self._moved.wait_for(partial(self._may_pass, number))
                    if self._failure is not None:
                        return
                self._passed(unit, outcome)
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
