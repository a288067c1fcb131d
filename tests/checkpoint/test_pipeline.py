"""Units through worker threads: in order at the turnstile, and an end to all when one fails."""

from __future__ import annotations

import errno
import random
import threading
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from idle_job import IdleJob

from condu.checkpoint import Options
from condu.checkpoint.job import Outcome
from condu.checkpoint.pipeline import Pipeline
from condu.checkpoint.room import Room
from condu.checkpoint.runner import Runner
from condu.checkpoint.target import Target
from condu.checkpoint.units import Unit
from condu.checkpoint.world import World
from condu_ext.layout import CHUNK

pytestmark = pytest.mark.filterwarnings("error")


def units(count: int) -> Iterator[Unit]:
    return (Unit(number, 0, ()) for number in range(count))


def rooms(count: int) -> list[Room]:
    return [Room(64) for _ in range(count)]


def fine() -> None:
    return None


@pytest.fixture(autouse=True)
def no_thread_is_left() -> Iterator[None]:
    before = threading.active_count()
    yield
    assert threading.active_count() == before


@pytest.mark.parametrize("workers", [1, 3, 8])
def test_in_order_and_one_at_a_time(workers: int) -> None:
    chance, passed, inside = random.Random(0), [], threading.Lock()
    delays = [chance.random() / 500 for _ in range(60)]

    def process(unit: Unit, room: Room) -> int:
        time.sleep(delays[unit.shard])
        return unit.shard * unit.shard

    def turn(unit: Unit, outcome: int) -> None:
        assert inside.acquire(blocking=False)
        assert outcome == unit.shard**2
        passed.append(unit.shard)
        inside.release()

    Pipeline(units(60), process, turn, fine).run(rooms(workers))
    assert passed == list(range(60))


def test_side_by_side() -> None:
    meet = threading.Barrier(3, timeout=10)
    Pipeline(units(3), lambda unit, room: meet.wait(), lambda unit, out: None, fine).run(rooms(3))


def test_a_room_is_its_unit_s_until_that_has_passed() -> None:
    memory = rooms(3)

    def process(unit: Unit, room: Room) -> Room:
        room.take(1, torch.int64).fill_(unit.shard)
        return room

    def turn(unit: Unit, room: Room) -> None:
        time.sleep(0.001)
        room.clear()
        assert room.take(1, torch.int64).item() == unit.shard

    Pipeline(units(40), process, turn, fine).run(memory)


@pytest.mark.parametrize("where", ["process", "turn", "units"])
@pytest.mark.parametrize("workers", [1, 4])
def test_first_error_ends_all(workers: int, where: str) -> None:
    begun: list[int] = []

    def fail(at: str, number: int) -> None:
        if at == where and number == 5:
            raise ValueError(f"unit {number}")

    def numbered() -> Iterator[Unit]:
        for unit in units(1000):
            fail("units", unit.shard)
            yield unit

    def process(unit: Unit, room: Room) -> None:
        begun.append(unit.shard)
        fail("process", unit.shard)
        time.sleep(0.001)

    pipeline = Pipeline(numbered(), process, lambda unit, _: fail("turn", unit.shard), fine)
    with pytest.raises(ValueError, match="unit 5"):
        pipeline.run(rooms(workers))
    assert max(begun) < 5 + 2 * workers


def test_what_the_check_raises_ends_all() -> None:
    begin = time.monotonic()

    def check() -> None:
        if time.monotonic() - begin > 0.1:
            raise RuntimeError("another one failed")

    slow = Pipeline(
        units(1000), lambda unit, room: time.sleep(0.01), lambda unit, outcome: None, check
    )
    with pytest.raises(RuntimeError, match="another one"):
        slow.run(rooms(2))
    assert time.monotonic() - begin < 3


def test_no_units() -> None:
    Pipeline(units(0), lambda unit, room: None, lambda unit, outcome: None, fine).run(rooms(2))


def test_disk_that_fails_ends_the_run(tmp_path: Path) -> None:
    """At once, not only when all units are done."""
    done = 0

    class Counted(IdleJob):
        def fuse(self, unit: Unit, inputs: Any, room: Room, generation: int) -> Outcome:
            nonlocal done
            done += 1
            return super().fuse(unit, inputs, room, generation)

    def full(names: Iterable[str]) -> None:
        raise OSError(errno.ENOSPC, "the disk is full")

    job = Counted([CHUNK * 4096] * 8, 1)
    target = Target(tmp_path, "job", temporary=False)
    target.claim()
    target.start_anew([])
    target.settle = full  # type: ignore[method-assign]
    with pytest.raises(OSError, match="the disk is full"):
        Runner(job, target, World(), Options(workers=2)).run()
    target.close()
    assert done < 2048  # of 8 shards of 512 units
