"""What a command leaves when it fails: nothing, or what the same command goes on from."""

from __future__ import annotations

import errno
import os
import random
import resource
import shutil
import tempfile
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from apart import apart
from faults import CALLS, full, interrupted
from runs import Commands, contents, leftovers, make_models
from safetensors.torch import load_file, save_file

from condu.checkpoint.options import Options
from condu.checkpoint.sources import open_source
from condu.checkpoint.state_files import StateFiles
from condu.checkpoint.world import World
from condu_ext import UnifiedDelta
from condu_ext.collective import Step
from condu_ext.storage import writer_lock

COMMANDS = ["unify", "absorb", "merge", "extract"]


@pytest.fixture(scope="module")
def commands(tmp_path_factory: pytest.TempPathFactory) -> Commands:
    folder = tmp_path_factory.mktemp("failing")
    make_models(folder)
    commands = Commands(folder)
    for name, out in (("unify_two", "two"), ("unify_third", "third")):
        assert apart(commands.run, name, folder / out).error is None
    return commands


@pytest.fixture
def mine(commands: Commands, tmp_path: Path) -> Commands:
    """A copy of the models, to be changed."""
    shutil.copytree(commands.folder, tmp_path / "models")
    return Commands(tmp_path / "models")


def change(folder: Path, tensor: str, element: int, value: float) -> None:
    for file in folder.glob("*.safetensors"):
        tensors = load_file(file)
        if tensor in tensors:
            tensors[tensor].view(-1)[element] = value
            save_file(tensors, file, {"format": "pt"})


def refused(commands: Commands, name: str, out: Path, kind: type[Exception], *words: str) -> None:
    """The command fails, says why, and leaves everything as it was."""
    before, old = leftovers(out.parent), contents(out) if out.is_dir() else {}
    ended = apart(commands.run, name, out)
    assert type(ended.error) is kind
    for word in words:
        assert word in str(ended.error)
    assert leftovers(out.parent) == before
    assert (contents(out) if out.is_dir() else {}) == old


@pytest.mark.parametrize(("tensor", "element"), [("first", 0), ("long", -1), ("whole", 65536)])
@pytest.mark.parametrize("value", [torch.nan, -torch.inf])
def test_not_finite(
    mine: Commands, tmp_path: Path, tensor: str, element: int, value: float
) -> None:
    change(mine.folder / "c", tensor, element, value)
    refused(mine, "unify", tmp_path / "new" / "out", ValueError, "'c'", repr(tensor))
    (tmp_path / "empty").mkdir()
    refused(mine, "unify", tmp_path / "empty", ValueError, "'c'", repr(tensor))
    refused(mine, "absorb", mine.folder / "two", ValueError, "'c'", repr(tensor))
    assert UnifiedDelta.load(mine.folder / "two").tasks == ("a", "b")


def test_other_base(mine: Commands, tmp_path: Path) -> None:
    change(mine.folder / "base", "last", 100_000, 0.5)
    refused(mine, "absorb", mine.folder / "two", ValueError, "'last'", "base")
    refused(mine, "extract", tmp_path / "new" / "out", ValueError, "'last'", "base")


def test_too_little_memory(commands: Commands, tmp_path: Path) -> None:
    ended = apart(commands.run_in, 1 << 20, "unify", tmp_path / "out")
    assert isinstance(ended.error, ValueError)
    assert "max_memory: 1 MiB" in str(ended.error)
    assert not leftovers(tmp_path)


def test_target_is_a_file(commands: Commands, tmp_path: Path) -> None:
    (tmp_path / "out").write_text("mine")
    refused(commands, "unify", tmp_path / "out", NotADirectoryError, "out")
    refused(commands, "extract", tmp_path / "out", ValueError, "out")
    refused(commands, "unify", tmp_path / "out" / "below", NotADirectoryError, "out")


def as_nobody(function: Callable[..., Any], *arguments: object) -> Any:
    user = os.geteuid()
    if user == 0:
        os.seteuid(65534)
    try:
        return function(*arguments)
    finally:
        os.seteuid(user)


@pytest.mark.parametrize("name", ["unify", "absorb"])
def test_no_permission(name: str) -> None:
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        folder.chmod(0o755)
        make_models(folder)
        commands, out = Commands(folder), folder / "out"
        assert apart(commands.run, "unify_two", folder / "two").error is None
        commands.before(name, out)
        out.mkdir(exist_ok=True)
        (out / ".lock").unlink(missing_ok=True)
        for file in folder.rglob("*.safetensors"):
            file.chmod(0o644)
        out.chmod(0o555)
        before = leftovers(out)
        ended = apart(as_nobody, commands.run, name, out)
        assert isinstance(ended.error, PermissionError)
        assert str(out) in str(ended.error)
        assert leftovers(out) == before
        out.chmod(0o755)


@pytest.mark.parametrize("name", ["unify", "absorb"])
def test_second_writer(commands: Commands, tmp_path: Path, name: str) -> None:
    out = tmp_path / "out"
    commands.before(name, out)
    out.mkdir(exist_ok=True)
    with writer_lock(out):
        refused(commands, name, out, RuntimeError, "out", "another process")


@dataclass
class Whole:
    """What a command writes when nothing fails, and how many calls of a kind it takes for that."""

    contents: dict[str, bytes]
    calls: dict[str, int]

    def committed(self, out: Path) -> bool:
        config = out / "config.json"
        return config.exists() and config.read_bytes() == self.contents["config.json"]


@pytest.fixture(scope="module")
def wholes(commands: Commands, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Whole]:
    @cache
    def whole(name: str) -> Whole:
        out, calls = tmp_path_factory.mktemp("whole") / "out", {}
        for kinds in (CALLS, ("pwrite",), ("fsync",)):
            commands.before(name, out)
            calls[kinds] = apart(commands.run, name, out, (None, None, kinds)).value["count"]
        return Whole(
            contents(out), {"all": calls.pop(CALLS), **{k[0]: n for k, n in calls.items()}}
        )

    return whole


def assert_goes_on(commands: Commands, name: str, out: Path, whole: Whole) -> None:
    """After a failure the old state is valid, and the command repeated gives what it would."""
    if name == "absorb":
        assert UnifiedDelta.load(out).tasks == ("a", "b")
        assert contents(commands.folder / "two").items() <= contents(out).items()
    else:
        assert not (out / "config.json").exists()
    assert apart(commands.run, name, out).error is None
    assert contents(out) == whole.contents
    assert not list(out.parent.glob(".*"))


@pytest.mark.parametrize("call", ["pwrite", "fsync"])
@pytest.mark.parametrize("name", COMMANDS)
def test_full_disk(
    commands: Commands, tmp_path: Path, wholes: Callable[[str], Whole], name: str, call: str
) -> None:
    out, whole = tmp_path / "out", wholes(name)
    calls = whole.calls[call]
    numbers = {0, calls - 2, calls - 1, random.Random(name + call).randrange(calls)}
    for number in sorted(numbers):
        commands.before(name, out)
        failed = apart(commands.run, name, out, (number, full, (call,)))
        assert isinstance(failed.error, OSError)
        assert failed.error.errno == errno.ENOSPC
        assert str(tmp_path) in str(failed.error.filename)
        if whole.committed(out):  # the folder could not be synced after the commit
            assert (call, number) == ("fsync", calls - 1)
            assert whole.contents.items() <= contents(out).items()
        else:
            assert_goes_on(commands, name, out, whole)


def with_small_files(function: Callable[..., Any], *arguments: object) -> Any:
    resource.setrlimit(resource.RLIMIT_FSIZE, (700_000, resource.RLIM_INFINITY))
    return function(*arguments)


@pytest.mark.parametrize("name", COMMANDS)
def test_file_too_large_for_the_system(
    commands: Commands, tmp_path: Path, wholes: Callable[[str], Whole], name: str
) -> None:
    out = tmp_path / "out"
    commands.before(name, out)
    failed = apart(with_small_files, commands.run, name, out)
    assert isinstance(failed.error, OSError)
    assert failed.error.errno == errno.EFBIG
    assert "00002-of" in str(failed.error.filename)
    assert_goes_on(commands, name, out, wholes(name))


def without_room(function: Callable[..., Any], *arguments: object) -> Any:
    usage = shutil.disk_usage("/")
    shutil.disk_usage = lambda _: usage._replace(free=2_000_000)  # type: ignore[assignment]
    return function(*arguments)


def test_no_room_is_seen_before_anything_is_written(commands: Commands, tmp_path: Path) -> None:
    ended = apart(without_room, commands.run, "unify", tmp_path / "new" / "out")
    assert isinstance(ended.error, OSError)
    assert "2.50 MB are to be written, but the disk has 2.00 MB free" in str(ended.error)
    assert not leftovers(tmp_path)


@pytest.mark.parametrize("name", ["unify", "absorb", "extract"])
def test_interrupt(
    commands: Commands, tmp_path: Path, wholes: Callable[[str], Whole], name: str
) -> None:
    out, whole = tmp_path / "out", wholes(name)
    calls = whole.calls["all"]
    for number in random.Random(name).sample(range(calls // 4, calls - 12), 2):
        commands.before(name, out)
        failed = apart(commands.run, name, out, (number, interrupted))
        assert isinstance(failed.error, KeyboardInterrupt)
        assert_goes_on(commands, name, out, whole)


@pytest.mark.parametrize("name", ["unify", "extract"])
def test_failure_around_the_commit(
    commands: Commands, tmp_path: Path, wholes: Callable[[str], Whole], name: str
) -> None:
    """Nothing is removed that counts, nor anything else that is there."""
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "file").write_text("mine")
    out, whole = tmp_path / "out", wholes(name)
    for number in range(1, 8):
        commands.before(name, out)
        apart(commands.run, name, out, (whole.calls["all"] - number, full))
        assert (tmp_path / "other" / "file").read_text() == "mine"
        if not whole.committed(out):
            assert apart(commands.run, name, out).error is None
        assert whole.contents.items() <= contents(out).items()


def test_dead_task_warned_of_as_an_error(commands: Commands, tmp_path: Path) -> None:
    """A warning that is an error comes after the commit, and takes nothing back."""
    folder, out = tmp_path / "models", tmp_path / "out"
    shutil.copytree(commands.folder, folder)
    for file in (folder / "base").glob("*.safetensors"):
        base = load_file(file)
        for name, step in {"a": 4, "b": -1, "c": 1}.items():
            moved = {n: t + step for n, t in base.items()}
            save_file(moved, folder / name / file.name, {"format": "pt"})
    ended = apart(warnings_are_errors, Commands(folder).run, "unify", out)
    assert isinstance(ended.error, UserWarning)
    assert "'b'" in str(ended.error)
    assert UnifiedDelta.load(out).rescaler("b") == 0
    assert not list(out.glob(".unfinished*"))


def warnings_are_errors(function: Callable[..., Any], *arguments: object) -> Any:
    warnings.simplefilter("error")
    return function(*arguments)


class FailsElsewhere(Step):
    """A step at whose end the others tell of an error."""

    def __exit__(self, *raised: Any) -> None:
        super().__exit__(*raised)
        if raised[0] is None:
            raise OSError("rank 1: no such folder")


@pytest.mark.parametrize(
    ("name", "inputs"), [("unify", 4), ("absorb", 3), ("merge", 2), ("extract", 2)]
)
def test_inputs_are_closed_when_another_process_fails(
    commands: Commands, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, inputs: int
) -> None:
    opened: list[object] = []
    closed: list[object] = []

    def watched(thing: Any) -> Any:
        close = thing.close
        opened.append(thing)
        thing.close = lambda: (closed.append(thing), close())
        return thing

    def watched_source(*arguments: Any, **options: Any) -> Any:
        return watched(open_source(*arguments, **options))

    def watched_state(state: StateFiles, folder: Path) -> None:
        init(state, folder)
        watched(state)

    init = StateFiles.__init__
    monkeypatch.setattr("condu.checkpoint.states.open_source", watched_source)
    monkeypatch.setattr(StateFiles, "__init__", watched_state)
    monkeypatch.setattr(World, "step", lambda world: FailsElsewhere(None))
    out = tmp_path / "out"
    commands.before(name, out)
    with pytest.raises(OSError, match="rank 1: no such folder"):
        getattr(commands, name)(out, Options(workers=1))
    assert len(opened) == inputs
    assert {id(thing) for thing in opened} == {id(thing) for thing in closed}
