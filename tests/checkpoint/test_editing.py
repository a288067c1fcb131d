"""Tasks dropped and renamed on disk, against doing it in memory."""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from small_states import TASKS, make_state, model, save
from typer.testing import CliRunner

import condu_ext as cx
from condu.checkpoint import editing
from condu.checkpoint.editing import drop, rename
from condu.state_commands import app
from condu_ext import loading
from condu_ext.manifest import read_manifest


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    return save(make_state(), tmp_path / "s")


def bytes_of(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir() if file.name != ".lock"}


def assert_equal(found: cx.UnifiedDelta, expected: cx.UnifiedDelta) -> None:
    assert found.tasks == expected.tasks
    assert all(torch.equal(found.delta[n], t) for n, t in expected.delta.items())
    for task in expected.tasks:
        assert found.rescaler(task) == expected.rescaler(task)
        assert all(torch.equal(found.mask(task)[n], m) for n, m in expected.mask(task).items())
        assert torch.equal(found.private(task)["head"], expected.private(task)["head"])


@pytest.mark.parametrize("task", TASKS)
def test_dropped_as_in_memory(saved: Path, task: str) -> None:
    """And the state goes on as the one in memory would."""
    before, state = bytes_of(saved), make_state()
    drop(saved, task)
    state.drop(task)
    loaded = cx.UnifiedDelta.load(saved)
    assert_equal(loaded, state)
    cx.absorb_(loaded, "more", model(7), model(0))
    cx.absorb_(state, "more", model(7), model(0))
    assert_equal(loaded, state)
    number = TASKS.index(task)
    gone = before.keys() - bytes_of(saved).keys()
    assert gone == {
        n for n in before if n.startswith((f"triggers-1-{number}", f"private-1-{number}"))
    }
    assert all(before[n] == data for n, data in bytes_of(saved).items() if n != "config.json")
    assert set(read_manifest(saved).files) == bytes_of(saved).keys() - {"config.json"}


def test_all_tasks_may_be_dropped(saved: Path) -> None:
    state = make_state()
    for task in TASKS:
        drop(saved, task)
        state.drop(task)
    assert_equal(cx.UnifiedDelta.load(saved), state)
    assert not list(saved.glob("triggers-*"))
    with pytest.raises(KeyError, match="unknown task 'cars'; the state holds none"):
        drop(saved, "cars")


def test_numbers_that_begin_alike(tmp_path: Path) -> None:
    """Task number 1 is not task number 11."""
    state = cx.unify({f"task {k}": {"w": torch.full((9,), 1.0 + k)} for k in range(12)}, None)
    state.save(tmp_path)
    drop(tmp_path, "task 1")
    state.drop("task 1")
    loaded = cx.UnifiedDelta.load(tmp_path)
    assert loaded.tasks == state.tasks
    assert len(list(tmp_path.glob("triggers-*"))) == 11


def test_renamed_as_in_memory(saved: Path) -> None:
    before, state = bytes_of(saved), make_state()
    rename(saved, "food", "../Größe 🙂")
    state.rename("food", "../Größe 🙂")
    assert_equal(cx.UnifiedDelta.load(saved), state)
    before.pop("config.json")
    after = bytes_of(saved)
    after.pop("config.json")
    assert after == before


def test_optional_parts_of_the_config_stay(saved: Path) -> None:
    config = json.loads((saved / "config.json").read_text())
    config["zero_sums"] = [1, 0, 0, 0, 5, 0, 0]
    (saved / "config.json").write_text(json.dumps(config))
    rename(saved, "food", "meals")
    drop(saved, "pets")
    manifest = read_manifest(saved)
    assert manifest.zero_sums == config["zero_sums"]
    assert (manifest.base_name, manifest.base_fingerprints) == ("tiny", config["base"]["xxh3"])


@pytest.mark.parametrize(
    ("command", "message"),
    [
        (["drop", "birds"], "unknown task 'birds'; the state holds cars, food, pets"),
        (["rename", "birds", "x"], "unknown task 'birds'"),
        (["rename", "food", "cars"], "task 'cars' is already in the state"),
        (["rename", "food", "food"], "task 'food' is already in the state"),
        (["rename", "food", ""], "a task's name is a non-empty string"),
    ],
)
def test_refusals_are_one_line_and_change_nothing(
    saved: Path, command: list[str], message: str
) -> None:
    before = bytes_of(saved)
    result = CliRunner().invoke(app, [command[0], str(saved), *command[1:]])
    assert result.exit_code == 2
    assert message in result.stderr
    assert len(result.stderr.splitlines()) == 1
    assert bytes_of(saved) == before


@pytest.mark.parametrize("edit", [lambda s: drop(s, "food"), lambda s: rename(s, "food", "meals")])
def test_one_writer_at_a_time(saved: Path, edit: Callable[[Path], None]) -> None:
    before = bytes_of(saved)
    with open(saved / ".lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(RuntimeError, match="another process is writing"):
            edit(saved)
    assert bytes_of(saved) == before


def test_folders_without_a_state_are_left_alone(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="holds no unified checkpoint"):
        drop(tmp_path, "a")
    with pytest.raises(FileNotFoundError, match="holds no unified checkpoint"):
        rename(tmp_path, "a", "b")
    assert not list(tmp_path.iterdir())


def test_a_full_disk_leaves_the_state(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    before = bytes_of(saved)
    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(OSError, match="No space left"):
        drop(saved, "food")
    assert bytes_of(saved) == before


def test_files_are_removed_after_the_commit(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Killed in between, or when a file cannot be removed, the task is dropped all the same."""

    def stuck(self: Path, missing_ok: bool = False) -> None:
        assert [task.name for task in read_manifest(saved).tasks] == ["cars", "pets"]
        raise PermissionError(13, "Permission denied", str(self))

    before = bytes_of(saved)
    with monkeypatch.context() as patch:
        patch.setattr(Path, "unlink", stuck)
        drop(saved, "food")
    assert bytes_of(saved).keys() == before.keys()
    assert cx.UnifiedDelta.load(saved).tasks == ("cars", "pets")


def test_the_commands(saved: Path) -> None:
    for command in (["drop", "food"], ["rename", "pets", "animals"]):
        result = CliRunner().invoke(app, [command[0], str(saved), *command[1:]])
        assert result.exit_code == 0, result.output
    assert cx.UnifiedDelta.load(saved).tasks == ("cars", "animals")


def test_a_drop_while_the_state_is_loaded(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The generation stays the same, so whoever loads must see by the rest that he has to begin
    again."""
    real = loading.read_manifest
    dropped = ["food", "pets"]

    def read_then_drop(directory: Path) -> object:
        manifest = real(directory)
        if dropped:
            drop(saved, dropped.pop())
        return manifest

    monkeypatch.setattr(loading, "read_manifest", read_then_drop)
    assert cx.UnifiedDelta.load(saved).tasks == ("cars",)
    assert editing.read_manifest(saved).generation == 1
