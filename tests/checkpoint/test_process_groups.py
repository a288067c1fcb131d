"""Several processes: the same bytes as one, and an error on all when one of them fails or dies."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from apart import Ended, apart, together
from faults import Noted, always, full, interrupted, killed, slow, stopped
from runs import TASKS, Commands, contents, leftovers, make_models, values
from test_failing_runs import change

import condu_ext as cx
from condu import checkpoint
from condu.checkpoint import Options, target
from condu.checkpoint.runner import Runner
from condu_ext.layout import CHUNK

COMMANDS = ["unify", "absorb", "merge", "extract"]


@pytest.fixture(scope="module")
def commands(tmp_path_factory: pytest.TempPathFactory) -> Commands:
    folder = tmp_path_factory.mktemp("groups")
    make_models(folder)
    commands = Commands(folder)
    for name, out in (("unify_two", "two"), ("unify_third", "third")):
        assert apart(commands.run, name, folder / out).error is None
    return commands


@pytest.fixture(scope="module")
def expected(commands: Commands) -> dict[str, dict[str, bytes]]:
    """What one process writes."""
    found = {}
    for name in COMMANDS:
        out = commands.folder / "expected"
        commands.before(name, out)
        assert apart(commands.run, name, out).error is None
        found[name] = contents(out)
        if name == "unify":  # a reference of its own
            base, *models = map(values, range(1 + len(TASKS)))
            whole = cx.unify(dict(zip(TASKS, models, strict=True)), base)
            state = cx.UnifiedDelta.load(out)
            assert [state.rescaler(t) for t in TASKS] == [whole.rescaler(t) for t in TASKS]
    return found


@pytest.mark.parametrize("world", [2, 3, 4])
@pytest.mark.parametrize("name", COMMANDS)
def test_same_bytes(
    commands: Commands, expected: Any, tmp_path: Path, name: str, world: int
) -> None:
    out = tmp_path / "out"
    commands.before(name, out)
    ends = together(world, commands.run, name, out)
    assert [end.error for end in ends] == [None] * world
    assert contents(out) == expected[name]
    if name != "extract":  # all had a part
        assert all(end.value["written"] for end in ends)
    assert not list(tmp_path.glob(".*"))


def test_several_processes_in_one_shard(commands: Commands, expected: Any, tmp_path: Path) -> None:
    ends = together(4, commands.run, "unify", tmp_path / "out")
    sharing = [
        end for end in ends if "unified-1-00002-of-00004.safetensors" in end.value["written"]
    ]
    assert len(sharing) >= 3
    assert contents(tmp_path / "out") == expected["unify"]


def test_more_processes_than_units(commands: Commands, expected: Any, tmp_path: Path) -> None:
    large = Commands(commands.folder, unit=64 * CHUNK)  # a unit a shard
    ends = together(4, large.run, "merge", tmp_path / "out")
    assert [end.error for end in ends] == [None] * 4
    assert not all(end.value["written"].keys() for end in ends)
    assert contents(tmp_path / "out") == expected["merge"]


def in_places_of_their_own(commands: Commands, name: str, folder: Path) -> Any:
    """A command on a relative path, where each process is in a folder of its own."""
    place = folder / str(torch.distributed.get_rank())
    place.mkdir()
    os.chdir(place)
    target._PATIENCE = 0.5
    commands.before(name, Path("out"))
    return commands.run(name, Path("out"))


@pytest.mark.parametrize("name", COMMANDS)
def test_folders_that_not_all_see(commands: Commands, tmp_path: Path, name: str) -> None:
    ends = together(2, in_places_of_their_own, commands, name, tmp_path)
    for end in ends:
        assert isinstance(end.error, OSError)
        assert f"{tmp_path / '1'}" in str(end.error)
        assert "all processes must see the same" in str(end.error)
    for rank in "01":
        if name == "absorb":  # the old state
            assert contents(tmp_path / rank / "out") == contents(commands.folder / "two")
        else:
            assert not leftovers(tmp_path / rank)


def shortened(commands: Commands, out: Path) -> None:
    """Somebody cuts a finished file short before the commit."""
    run = Runner.run

    def run_and_cut(runner: Runner) -> Any:
        records = run(runner)
        os.truncate(out / "unified-1-00002-of-00004.safetensors", 1000)
        return records

    Runner.run = run_and_cut  # type: ignore[method-assign]
    commands.run("unify", out)


def test_no_commit_of_files_that_are_not_there(commands: Commands, tmp_path: Path) -> None:
    ended = apart(shortened, commands, tmp_path / "out")
    assert isinstance(ended.error, OSError)
    assert "unified-1-00002-of-00004.safetensors: has 1000 bytes" in str(ended.error)
    assert not (tmp_path / "out" / "config.json").exists()


def within(seconds: float, *call: Any) -> list[Ended]:
    begin = time.monotonic()
    ends = together(*call)
    assert time.monotonic() - begin < seconds
    return ends


@pytest.mark.parametrize("tensor", ["first", "bias"])  # of the first process, and of the last
@pytest.mark.parametrize("name", ["unify", "absorb"])
def test_bad_input_of_one(commands: Commands, tmp_path: Path, name: str, tensor: str) -> None:
    folder, out = tmp_path / "models", tmp_path / "out"
    shutil.copytree(commands.folder, folder)
    mine = Commands(folder)
    change(folder / "c", tensor, 0, torch.nan)
    mine.before(name, out)
    before = leftovers(tmp_path)
    for end in within(20, 3, mine.run, name, out):
        assert type(end.error) is ValueError
        assert f"'c', tensor {tensor!r}" in str(end.error)
    assert leftovers(tmp_path) == before


def on_rank(rank: int, commands: Commands, name: str, out: Path, disk: tuple[Any, ...]) -> Any:
    """A command whose disk fails on one of the processes; gone ones are missed after 2 s."""
    own = disk if torch.distributed.get_rank() == rank else ()
    return commands.run(name, out, own, 2.0)


@pytest.mark.parametrize("rank", [0, 2])
def test_full_disk_of_one(commands: Commands, expected: Any, tmp_path: Path, rank: int) -> None:
    out = tmp_path / "out"
    commands.before("absorb", out)
    disk = (4, full, ("pwrite",))
    for end in within(20, 3, on_rank, rank, commands, "absorb", out, disk):
        assert isinstance(end.error, OSError)
        assert "No space left" in str(end.error)
        assert str(out) in str(end.error)
    assert cx.UnifiedDelta.load(out).tasks == TASKS[:2]
    assert together(2, commands.run, "absorb", out)[0].error is None
    assert contents(out) == expected["absorb"]


@pytest.mark.parametrize("at", [3, 9, Noted])
@pytest.mark.parametrize("rank", [0, 1, 2])
def test_killed_one(commands: Commands, expected: Any, tmp_path: Path, rank: int, at: Any) -> None:
    out = tmp_path / "out"
    commands.before("absorb", out)
    number = Noted(out) if at is Noted else at
    ends = within(25, 3, on_rank, rank, commands, "absorb", out, (number,))
    assert ends.pop(rank).status == -signal.SIGKILL
    for end in ends:
        assert isinstance(end.error, RuntimeError)
    assert cx.UnifiedDelta.load(out).tasks == TASKS[:2]
    ends = together(2, commands.run, "absorb", out)
    assert [end.error for end in ends] == [None] * 2
    assert contents(out) == expected["absorb"]


def costs_of(folder: Path, out: Path) -> tuple[int, int, int, int]:
    options = Options(workers=2)
    a, base = folder / "two", folder / "base"
    costs = checkpoint.absorb(a, "new", folder / "c", out, base=base, options=options)
    return costs.read, costs.written, costs.verified, costs.workers


def test_costs_are_those_of_all_processes(commands: Commands, tmp_path: Path) -> None:
    one = apart(costs_of, commands.folder, tmp_path / "one").value
    written = sum(f.stat().st_size for f in (tmp_path / "one").glob("*.safetensors"))
    assert one[1] == pytest.approx(written, abs=10_000)  # headers
    for end in together(2, costs_of, commands.folder, tmp_path / "two"):
        assert end.value[:2] == pytest.approx(one[:2], abs=8)
        assert end.value[2] == one[2] > 0
        assert end.value[3] == 2 * one[3]


def one_of_slow_ones(commands: Commands, out: Path, happens: Any) -> Any:
    """Something happens on rank 1, while the others would be busy for a quarter of a minute."""
    disk = (always, slow, ("preadv",))
    if torch.distributed.get_rank() == 1:
        disk = (12, happens, ("preadv",))
    return commands.run("unify", out, disk, 2.0)


@pytest.mark.parametrize("happens", [full, interrupted, killed, stopped])
def test_others_stop_at_once(
    commands: Commands, expected: Any, tmp_path: Path, happens: Any
) -> None:
    out = tmp_path / "out"
    patient = Commands(commands.folder, workers=1)
    begin = time.monotonic()
    ends = together(3, one_of_slow_ones, patient, out, happens, timeout=8)
    assert time.monotonic() - begin < 8
    for end in (ends[0], ends[2]):
        assert isinstance(end.error, OSError if happens is full else RuntimeError)
        said = {full: "No space left", interrupted: "gave up", killed: "gone", stopped: "gone"}
        assert any(word in str(end.error) for word in (said[happens], "gave up"))
    assert not (out / "config.json").exists()
    assert apart(commands.run, "unify", out).error is None
    assert contents(out) == expected["unify"]


@pytest.mark.parametrize("rank", [0, 2])
def test_one_hangs_while_others_wait(
    commands: Commands, expected: Any, tmp_path: Path, rank: int
) -> None:
    out = tmp_path / "out"
    begin = time.monotonic()
    ends = together(3, on_rank, rank, commands, "unify", out, (3, stopped, ("pwrite",)), timeout=12)
    assert time.monotonic() - begin < 12
    assert ends.pop(rank).status is None
    for end in ends:
        assert isinstance(end.error, RuntimeError)
        assert f"rank {rank} is gone" in str(end.error) or "gave up" in str(end.error)
    assert not (out / "config.json").exists()
    assert apart(commands.run, "unify", out).error is None
    assert contents(out) == expected["unify"]


def one_after_another(commands: Commands, folder: Path) -> None:
    """Calls of one group, after one of them failed on all."""
    commands.unit = CHUNK
    with pytest.raises(ValueError, match="'c', tensor 'bias'"):
        commands.run("unify", folder / "bad")
    Commands(commands.folder.parent / "good").run("unify", folder / "out")


def test_group_serves_again_after_a_failure(
    commands: Commands, expected: Any, tmp_path: Path
) -> None:
    (tmp_path / "good").symlink_to(commands.folder)
    shutil.copytree(commands.folder, tmp_path / "bad")
    change(tmp_path / "bad" / "c", "bias", 3, torch.inf)
    ends = together(2, one_after_another, Commands(tmp_path / "bad"), tmp_path)
    assert [end.error for end in ends] == [None] * 2
    found = contents(tmp_path / "out")
    assert found.keys() == expected["unify"].keys()


def test_torchrun(commands: Commands, tmp_path: Path) -> None:
    """The command line under torchrun."""
    program = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]
    program += ["--master-addr", "127.0.0.1", "--master-port", str(free_port())]
    program += ["-m", "condu.checkpoint", "unify", str(commands.folder / "base")]
    program += [text for t in TASKS for text in ("--task", f"{t}={commands.folder / t}")]
    program += ["-o", str(tmp_path / "two"), "--quiet"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    subprocess.run(program, check=True, timeout=120, env=environment)
    assert apart(commands.run_in, 2 << 30, "unify", tmp_path / "one").error is None
    assert contents(tmp_path / "two") == contents(tmp_path / "one")


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])
