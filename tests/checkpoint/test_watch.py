"""Processes that hang or are gone, seen by those that wait for them."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator

import pytest
import torch.distributed as dist

from condu.checkpoint import watch, world
from condu.checkpoint.watch import OtherFailed, OtherGone, Watch
from condu.checkpoint.world import World


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watch, "_BEAT", 0.05)
    monkeypatch.setattr(watch, "_SILENCE", 0.5)


@pytest.fixture
def three() -> Iterator[list[Watch]]:
    store = dist.HashStore()
    watches = [Watch(store, "run", rank, 3) for rank in range(3)]
    for each in watches:
        each.start()
    yield watches
    for each in watches:
        each.stop()


def test_all_come(three: list[Watch]) -> None:
    """However late; and nobody leaves a meeting before all have come."""
    come = [0, 0, 0]

    def take_part(rank: int) -> None:
        for meeting in range(1, 6):
            time.sleep(0.1 * (rank == meeting % 3))
            come[rank] = meeting
            three[rank].meet()
            assert min(come) >= meeting

    others = [threading.Thread(target=take_part, args=(rank,)) for rank in (1, 2)]
    for other in others:
        other.start()
    take_part(0)
    for other in others:
        other.join()
    assert come == [5, 5, 5]


def test_one_that_works_for_long_is_waited_for(three: list[Watch]) -> None:
    late = threading.Timer(1.5, three[2].meet)
    for each in (late, other := threading.Thread(target=three[1].meet)):
        each.start()
    three[0].meet()
    other.join()


def test_one_that_hangs(three: list[Watch]) -> None:
    three[1].stop()
    with pytest.raises(OtherGone, match="rank 1 is gone"):
        three[0].meet()


def test_one_that_hangs_after_another_failed(three: list[Watch]) -> None:
    three[2].tell("failed")
    while True:
        try:
            three[0].check()
        except OtherFailed:
            break
    three[1].stop()
    with pytest.raises(OtherGone, match="rank 1 is gone"):
        three[0].meet()


def test_store_that_hangs() -> None:
    class Hanging(dist.HashStore):
        def check(self, keys: list[str]) -> bool:
            time.sleep(3)
            return True

    alone = Watch(Hanging(), "run", 0, 2)
    alone.start()
    begin = time.monotonic()
    for look in (alone.meet, alone.check):
        with pytest.raises(OtherGone, match="that connects the others is gone"):
            look()
    alone.stop()
    assert time.monotonic() - begin < 2


def test_backend_that_loses_a_process(monkeypatch: pytest.MonkeyPatch) -> None:
    def gather(mesh: object, item: object) -> None:
        raise RuntimeError("[../third_party/gloo/transport/tcp/pair.cc:547]\nreset by peer")

    class Present(Watch):
        def meet(self) -> None:
            pass

    monkeypatch.setattr(world, "gather", gather)
    mine = World(0, 2, None, Present(dist.HashStore(), "run", 0, 2))
    with pytest.raises(OtherGone, match=r"^another process is gone$"):
        mine._meet(None, "item")  # type: ignore[arg-type]
