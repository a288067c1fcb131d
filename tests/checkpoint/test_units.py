"""How models are cut into units, and how processes share these."""

from __future__ import annotations

from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st

from condu.checkpoint.units import Division, Segment, Unit, cut
from condu_ext.layout import ALIGN, CHUNK, chunk_count, offsets

NUMELS = st.lists(
    st.one_of(
        st.integers(0, 3),
        st.integers(0, 5 * CHUNK),
        st.sampled_from([ALIGN, CHUNK - 1, CHUNK, CHUNK + 1, 2 * CHUNK, 9 * CHUNK + 5]),
    ),
    max_size=12,
)
ROOMS = st.integers(0, 6 * CHUNK)


@given(NUMELS, ROOMS)
def test_every_element_once_and_in_order(numels: list[int], room: int) -> None:
    units = list(cut(3, range(len(numels)), numels, room))
    done = [(s.tensor, s.start, s.stop) for unit in units for s in unit.segments]
    expected = [
        (t, at) for t, numel in enumerate(numels) for at in range(0, numel, CHUNK)
    ]  # chunks
    assert [(t, at) for t, start, stop in done for at in range(start, stop, CHUNK)] == expected
    for tensor, start, stop in done:
        assert start % CHUNK == 0
        assert stop % CHUNK == 0 or stop == numels[tensor]
        assert start < stop
    assert sum(stop - start for _, start, stop in done) == sum(numels)


@given(NUMELS, ROOMS)
def test_units_fit_into_their_room(numels: list[int], room: int) -> None:
    for unit in cut(0, range(len(numels)), numels, room):
        assert offsets(unit.numels)[1] <= max(CHUNK, room)


@given(NUMELS, ROOMS)
def test_units_know_their_chunks(numels: list[int], room: int) -> None:
    units = list(cut(0, range(len(numels)), numels, room))
    assert units[0].chunk == 0  # a shard without elements has a unit, too
    for unit, after in pairwise(units):
        assert after.chunk == unit.chunk + chunk_count(unit.numels)
    assert units[-1].chunk + chunk_count(units[-1].numels) == chunk_count(numels)


def test_units_are_as_large_as_they_can_be() -> None:
    numels = [10, 3 * CHUNK, 5]
    assert list(cut(7, [0, 1, 2], numels, 2 * CHUNK)) == [
        Unit(7, 0, (Segment(0, 0, 10), Segment(1, 0, CHUNK))),
        Unit(7, 2, (Segment(1, CHUNK, 3 * CHUNK),)),
        Unit(7, 4, (Segment(2, 0, 5),)),
    ]


SHARDS = st.lists(NUMELS, min_size=1, max_size=5)


def division(shards: list[list[int]], room: int, processes: int) -> tuple[Division, list[Unit]]:
    """A division, and all units as one list."""
    numels = [n for shard in shards for n in shard]
    positions = iter(range(len(numels)))
    tensors = {2 * k: [next(positions) for _ in shard] for k, shard in enumerate(shards)}
    units = [unit for k, group in tensors.items() for unit in cut(k, group, numels, room)]
    return Division(tensors, numels, room, processes), units


@given(SHARDS, ROOMS, st.integers(1, 6))
def test_processes_share_all_units_in_order(
    shards: list[list[int]], room: int, processes: int
) -> None:
    divided, units = division(shards, room, processes)
    shares = [list(divided.units(process)) for process in range(processes)]
    assert [unit for share in shares for unit in share] == units
    for process, share in enumerate(shares):
        for k in {unit.shard for unit in units}:
            count = sum(unit.shard == k for unit in share)
            assert divided.count(process, k) == count
            assert (process in divided.owners(k)) == (count > 0)


@given(SHARDS, ROOMS, st.integers(1, 6))
def test_shares_are_balanced(shards: list[list[int]], room: int, processes: int) -> None:
    """Each has an equal part, give or take a unit."""
    divided, units = division(shards, room, processes)
    largest = max(unit.elements for unit in units)
    part = sum(unit.elements for unit in units) / processes
    for process in range(processes):
        assert abs(sum(u.elements for u in divided.units(process)) - part) <= largest


def test_nothing_to_share() -> None:
    divided = Division({}, [], CHUNK, 3)
    assert [list(divided.units(process)) for process in range(3)] == [[], [], []]
