"""A run that was killed leaves its target as it was, and the same command goes on from there."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from apart import apart, together
from faults import Noted
from runs import SHARD_BYTES, TASKS, Commands, contents, make_models
from safetensors import safe_open

from condu.checkpoint import Options
from condu.checkpoint.states import prepare_unify
from condu_ext import FusionRule, UnifiedDelta, storage

KILLS = 8  # of each command, and eight more towards its end


@pytest.fixture(scope="module")
def commands(tmp_path_factory: pytest.TempPathFactory) -> Commands:
    folder = tmp_path_factory.mktemp("killed")
    make_models(folder)
    commands = Commands(folder)
    for name, out in (("unify_two", "two"), ("unify_third", "third")):
        assert apart(commands.run, name, folder / out).error is None
    return commands


def undisturbed(commands: Commands, name: str, out: Path) -> tuple[dict[str, bytes], int]:
    """What a command writes, and how many calls it takes for that."""
    commands.before(name, out)
    ended = apart(commands.run, name, out)
    assert ended.error is None
    return contents(out), ended.value["count"]


def assert_as_before(commands: Commands, name: str, out: Path) -> None:
    """The target is what it was before the command."""
    if name != "absorb":
        assert not (out / "config.json").exists()
        return
    state = UnifiedDelta.load(out)
    assert state.tasks == ("a", "b")
    old = contents(commands.folder / "two")
    assert old.items() <= contents(out).items()


def committed(out: Path, expected: dict[str, bytes]) -> bool:
    config = out / "config.json"
    return config.exists() and config.read_bytes() == expected["config.json"]


def noted(*folders: Path) -> dict[str, int]:
    """Files that journals list → when they were written."""
    lines = [
        (folder, line)
        for folder in filter(Path.is_dir, folders)
        for journal in folder.glob(".unfinished-*.jsonl")
        for line in journal.read_text().splitlines()
        if line.endswith("}")
    ]
    names = [(folder, name) for folder, line in lines for name in json.loads(line)["files"]]
    return {name: (folder / name).stat().st_mtime_ns for folder, name in names}


@pytest.mark.parametrize("name", ["unify", "absorb", "extract"])
def test_kills(commands: Commands, tmp_path: Path, name: str) -> None:
    out = tmp_path / "out"
    hidden = tmp_path / ".out.unfinished"  # of a model
    expected, calls = undisturbed(commands, name, out)
    late = range(calls - 6, calls)  # the commit
    chosen = sorted({*random.Random(name).sample(range(calls), KILLS), *late})
    folder = hidden if name == "extract" else out
    went_on = 0
    for number in (*chosen, Noted(folder, 1), Noted(folder, 2)):
        commands.before(name, out)
        ended = apart(commands.run, name, out, (number,))
        assert ended.status == -signal.SIGKILL, number
        if committed(out, expected):
            assert expected.items() <= contents(out).items(), number
            continue
        assert_as_before(commands, name, out)
        times = noted(out, hidden)
        ended = apart(commands.run, name, out)
        assert ended.error is None, number
        assert contents(out) == expected, number
        assert not hidden.exists()
        assert not times.keys() & ended.value["written"].keys()
        for file, time in times.items():
            assert (out / file).stat().st_mtime_ns == time
        if times:
            went_on += 1
            assert any("finished by an earlier run" in line for line in ended.value["lines"])
    assert went_on >= 2


def test_killed_again_and_again(commands: Commands, tmp_path: Path) -> None:
    out = tmp_path / "out"
    expected, _ = undisturbed(commands, "absorb", out)
    commands.before("absorb", out)
    chance = random.Random(1)
    for _ in range(30):
        if apart(commands.run, "absorb", out, (chance.randrange(25, 60),)).error is None:
            ended = apart(commands.run, "absorb", out)
            if ended.error is None or "already in the state" in str(ended.error):
                break
    assert contents(out) == expected


def unfinished(commands: Commands, name: str, out: Path, shards: int = 1) -> dict[str, int]:
    """Kill a command when it has finished so many shards; their files, as :func:`noted`."""
    commands.before(name, out)
    assert apart(commands.run, name, out, (Noted(out, shards),)).status == -signal.SIGKILL
    return noted(out)


@pytest.mark.parametrize("damage", ["changed", "longer", "shorter", "missing"])
def test_damaged_file_is_made_again(commands: Commands, tmp_path: Path, damage: str) -> None:
    out = tmp_path / "out"
    expected, _ = undisturbed(commands, "unify", out)
    file = out / max(unfinished(commands, "unify", out))
    if damage == "missing":
        file.unlink()
    else:
        data = bytearray(file.read_bytes())
        data[-1] ^= 1
        new = {"changed": data, "longer": data + b"0", "shorter": data[:-1]}[damage]
        file.write_bytes(new)
    ended = apart(commands.run, "unify", out)
    assert ended.error is None
    assert file.name in ended.value["written"]
    assert contents(out) == expected


@pytest.mark.parametrize(
    "tear",
    [
        lambda text: text[:-1],
        lambda text: text[: len(text) // 2],
        lambda text: text[:9],
        lambda text: text[text.index("\n") // 2 :],
        lambda text: '{"job": 3}\n[]\nnonsense\n\x00\x00' + text,
        lambda text: "",
    ],
    ids=["end", "middle", "beginning", "front", "garbage", "empty"],
)
def test_torn_journal(commands: Commands, tmp_path: Path, tear: Any) -> None:
    out = tmp_path / "out"
    expected, _ = undisturbed(commands, "unify", out)
    unfinished(commands, "unify", out)
    journal = out / ".unfinished-0.jsonl"
    journal.write_text(tear(journal.read_text()))
    assert apart(commands.run, "unify", out).error is None
    assert contents(out) == expected


def test_goes_on_behind_a_torn_line(commands: Commands, tmp_path: Path) -> None:
    """What a second run notes behind a line that was cut short is read by a third one."""
    out = tmp_path / "out"
    expected, _ = undisturbed(commands, "unify", out)
    unfinished(commands, "unify", out, 2)
    journal = out / ".unfinished-0.jsonl"
    first, *_ = journal.read_text().splitlines()
    journal.write_text(first + "\n" + first[:-9])
    apart(commands.run, "unify", out, (Noted(out, 2),))
    lines = journal.read_text().splitlines()
    assert lines[:2] == [first, first[:-9]]
    files = {name for line in (first, *lines[2:]) for name in json.loads(line)["files"]}
    assert len(files) >= 8
    ended = apart(commands.run, "unify", out)
    assert contents(out) == expected
    assert not files & ended.value["written"].keys()


@pytest.mark.parametrize("other", ["unify_two", "merge"])
def test_another_command_starts_anew(commands: Commands, tmp_path: Path, other: str) -> None:
    out = tmp_path / "out"
    expected, _ = undisturbed(commands, other, out)
    times = unfinished(commands, "unify", out)
    ended = apart(commands.run, other, out)
    assert ended.error is None
    assert not ended.value["lines"]
    assert contents(out) == expected
    assert times.keys() & expected.keys() <= ended.value["written"].keys()


def test_another_absorb_starts_anew(commands: Commands, tmp_path: Path) -> None:
    """Of the same task from a model that was changed in between."""
    folder, out = tmp_path / "models", tmp_path / "out"
    make_models(folder)
    (folder / "two").symlink_to(commands.folder / "two")
    mine = Commands(folder)
    unfinished(mine, "absorb", out)
    file = folder / "c" / "model-00001-of-00003.safetensors"
    status = file.stat()
    os.utime(file, ns=(status.st_atime_ns, status.st_mtime_ns + 1))
    ended = apart(mine.run, "absorb", out)
    assert ended.error is None
    assert not ended.value["lines"]
    assert len(ended.value["written"]) == 4 * (1 + 3)
    expected, _ = undisturbed(mine, "absorb", tmp_path / "other")
    assert contents(out) == expected


def test_model_of_another_command(commands: Commands, tmp_path: Path) -> None:
    """The hidden folder of a model may hold anything, folders too."""
    out, hidden = tmp_path / "out", tmp_path / ".out.unfinished"
    expected, calls = undisturbed(commands, "extract", out)
    commands.before("extract", out)
    apart(commands.run, "extract", out, (calls - 4,))
    assert (hidden / "processor").is_dir()
    for journal in hidden.glob(".unfinished-*"):
        journal.unlink()
    (hidden / "old.safetensors").write_bytes(b"old")
    assert apart(commands.run, "extract", out).error is None
    assert contents(out) == expected
    with safe_open(out / "model-00001-of-00003.safetensors", "pt") as model:
        assert list(model.keys()) == ["first"]


def overtaken(commands: Commands, out: Path) -> None:
    """Between a command's checks and its run another process commits there, and is killed."""
    storage.SHARD_BYTES = SHARD_BYTES
    tasks = {task: commands.folder / task for task in TASKS}
    with prepare_unify(
        commands.folder / "base",
        tasks,
        out,
        rule=FusionRule(),
        dtype=torch.float32,
        private=(),
        options=Options(),
    ) as late:
        call = (lambda _: (out / "config.json").exists(), None, ("unlink",))
        child = os.fork()
        if not child:
            commands.run("unify", out, call)
        os.waitpid(child, 0)
        late.run()


def test_overtaken(commands: Commands, tmp_path: Path) -> None:
    """The same command, twice at a time: the second one leaves alone what the first one made."""
    out = tmp_path / "out"
    expected, _ = undisturbed(commands, "unify", out)
    shutil.rmtree(out)
    ended = apart(overtaken, commands, out)
    assert isinstance(ended.error, ValueError)
    assert "another process made a state there meanwhile" in str(ended.error)
    assert expected.items() <= contents(out).items()


@pytest.mark.parametrize(("before", "after"), [(3, 1), (1, 2), (2, 4)])
def test_with_other_numbers_of_processes(
    commands: Commands, tmp_path: Path, before: int, after: int
) -> None:
    out = tmp_path / "out"
    expected, _ = undisturbed(commands, "unify", out)
    commands.before("unify", out)
    ends = together(before, commands.run, "unify", out, (Noted(out),), 2.0)
    assert any(end.status == -signal.SIGKILL for end in ends)
    assert all(end.status or end.error for end in ends)
    times = noted(out)
    ends = together(after, commands.run, "unify", out)
    assert [end.error for end in ends] == [None] * after
    written = set().union(*(end.value["written"] for end in ends))
    assert not times.keys() & written
    assert contents(out) == expected
