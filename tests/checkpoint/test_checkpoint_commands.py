"""The commands as a user types them, and what they say to damaged and hostile input."""

from __future__ import annotations

import errno
import io
import json
import os
import re
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny_models
import torch
from range_models import data_bytes, load, save
from rich.console import Console
from safetensors.torch import load_file
from typer.testing import CliRunner, Result

import condu_ext as cx
from condu import checkpoint
from condu.checkpoint import Options, memory, world
from condu.checkpoint.bar import progress_bar
from condu.cli import app


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a sharded base model and two fine-tuned ones, where commands run."""
    monkeypatch.chdir(tmp_path)
    tiny_models.llama(Path("base"), seed=0, dtype=torch.bfloat16)
    for seed, task in enumerate(("ft1", "ft2"), start=1):
        tiny_models.finetuned(Path("base"), Path(task), seed=seed)
    return tmp_path


def condu(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def done(*arguments: object) -> str:
    result = condu(*arguments)
    assert result.exit_code == 0, result.output
    return result.stdout


def refused(*arguments: object) -> str:
    """The one line that a command wrote before it ended with status 2."""
    result = condu(*arguments)
    assert result.exit_code == 2, result.output
    assert result.stdout == ""
    (line,) = result.stderr.splitlines()
    assert line.startswith("error: ")
    return line.removeprefix("error: ")


UNIFY = ("unify", "base", "--task", "a=ft1", "--task", "b=ft2", "-o", "state")


def test_a_sequence_of_commands() -> None:
    summary = done("unify", "base", "--task", "a=ft1", "-o", "state")
    assert re.match(r"read \d+\.\d\d kB, wrote \d+\.\d\d kB in \d+\.\d\d s .*\n$", summary)
    done("absorb", "state", "--base", "base", "--task", "b=ft2")
    done("absorb", "state", "--base", "base", "--task", "c=ft2", "-o", "state2")
    assert cx.UnifiedDelta.load("state").tasks == ("a", "b")
    assert cx.UnifiedDelta.load("state2").tasks == ("a", "b", "c")
    assert done("unify", "base", "--task", "z=ft1", "-o", "other", "--quiet") == ""
    done("merge", "state2", "other", "-o", "both")
    done("extract", "both", "--base", "base", "--task", "b", "-o", "expert")
    base = load(Path("base"))
    expected = cx.decouple(cx.UnifiedDelta.load("both"), "b", base)
    found = load(Path("expert"))
    assert all(torch.equal(found[name], expected[name]) for name in base)


def test_names_cannot_steer_the_terminal() -> None:
    done("unify", "base", "--task", "\x1b[2Ja=ft1", "-o", "state")
    errors = condu("extract", "state", "--base", "base", "--task", "x", "-o", "expert").stderr
    assert errors == "error: unknown task 'x'; the state holds \\x1b[2Ja\n"


def test_the_state_dtype_and_the_rule() -> None:
    done(*UNIFY, "--state-dtype", "bf16", "--zero-sum", "zero", "--rescale", "per_tensor")
    state = cx.UnifiedDelta.load("state")
    assert state.dtype == torch.bfloat16
    assert state.rule == cx.FusionRule(zero_sum="zero", rescale="per_tensor")


def test_plan_writes_nothing_and_says_what_would_be() -> None:
    before = sorted(Path().rglob("*"))
    text = done("plan", *UNIFY)
    assert sorted(Path().rglob("*")) == before
    for line in ("to read", "to write", "memory, at most", "expected time"):
        assert line in text
    assert "--state-dtype bf16 would write" in text
    done(*UNIFY)
    assert "to write" in done("plan", "absorb", "state", "--base", "base", "--task", "c=ft1")
    assert "to write" in done(
        "plan", "extract", "state", "--base", "base", "--task", "a", "-o", "x"
    )
    assert "unknown task 'x'" in refused(
        "plan", "extract", "state", "--base", "base", "--task", "x", "-o", "x"
    )


def truncate(folder: Path) -> None:
    file = shard(folder)
    file.write_bytes(file.read_bytes()[:-10])


def shard(folder: Path) -> Path:
    return sorted(folder.glob("model-*.safetensors"))[1]


def leave_the_folder(folder: Path) -> None:
    tiny_models.change_index(
        folder, {"model.norm.weight": "../ft2/model-00001-of-00002.safetensors"}
    )


def list_what_is_not_there(folder: Path) -> None:
    tiny_models.change_index(folder, {"no.such.weight": shard(folder).name})


def rewrite(folder: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    tensors = load_file(shard(folder))
    change(tensors)
    shutil.move(save(tensors, folder / "new"), shard(folder))


def wrong_dtype(folder: Path) -> None:
    rewrite(folder, lambda t: t.update({"model.norm.weight": t["model.norm.weight"].double()}))


def one_nan(folder: Path) -> None:
    rewrite(folder, lambda t: t["model.norm.weight"][3].fill_(torch.nan))


def overlap(folder: Path) -> None:
    data = shard(folder).read_bytes()
    size = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + size])
    first, second = (name for name in list(header)[1:3])
    header[second]["data_offsets"] = header[first]["data_offsets"]
    header[second]["shape"] = header[first]["shape"]
    text = json.dumps(header).encode()
    shard(folder).write_bytes(len(text).to_bytes(8, "little") + text + data[8 + size :])


HOSTILE = {
    truncate: r"ft1/model-00002-of-0000\d.safetensors: not a valid safetensors file",
    leave_the_folder: r"ft1/model.safetensors.index.json: .*\.\./ft2",
    list_what_is_not_there: r"ft1/.*no\.such\.weight",
    wrong_dtype: r"task 'a', tensor 'model\.norm\.weight': torch\.float64 cannot be fused",
    one_nan: r"task 'a', tensor 'model\.norm\.weight': .* NaN or infinite",
    overlap: r"ft1/model-00002-of-0000\d.safetensors: not a valid safetensors file",
}


@pytest.mark.parametrize("damage", HOSTILE, ids=lambda f: f.__name__)
def test_hostile_input_is_one_line_and_nothing_is_written(damage: Callable[[Path], None]) -> None:
    damage(Path("ft1"))
    before = sorted(Path().rglob("*"))
    assert re.search(HOSTILE[damage], refused(*UNIFY))
    assert sorted(Path().rglob("*")) == before
    done("unify", "base", "--task", "b=ft2", "-o", "old")
    state = data_bytes(Path("old"))
    assert re.search(HOSTILE[damage], refused("absorb", "old", "--base", "base", "--task", "a=ft1"))
    assert data_bytes(Path("old")) == state


def test_folders_that_cannot_be_read_or_written(monkeypatch: pytest.MonkeyPatch) -> None:
    Path("file").touch()
    for place in ("file/state", "file"):
        assert "file" in refused(*UNIFY[:-1], place)
    assert "nowhere" in refused("unify", "base", "--task", "a=nowhere", "-o", "state")
    assert "nowhere" in refused("absorb", "nowhere", "--base", "base", "--task", "a=ft1")
    if os.getuid():  # to root everything is permitted
        Path("ft1").chmod(0)
        assert "Permission denied" in refused(*UNIFY)
        Path("ft1").chmod(0o755)
    else:
        real = os.open

        def denied(path: os.PathLike[str] | str, *rest: int, **more: int) -> int:
            if "state" in os.fspath(path):
                raise PermissionError(13, "Permission denied", os.fspath(path))
            return real(path, *rest, **more)

        monkeypatch.setattr(os, "open", denied)
        assert "Permission denied" in refused(*UNIFY)
    assert not Path("state").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--max-memory", "much"), "--max-memory must be a size such as 2G or 500M, not 'much'"),
        (("--max-memory", "1M"), r"max_memory: 1 MiB are too few; this needs \d+ MiB"),
        (("--state-dtype", "fp16"), "--state-dtype must be fp32 or bf16, not 'fp16'"),
        (("--zero-sum", "up"), "zero_sum"),
        (("--device", "abacus"), "^device must be 'cpu' or 'cuda', not 'abacus'$"),
        (("--task", "a=ft2"), "--task 'a' is given twice"),
        (("--task", "ft2"), "--task must be NAME=FINETUNED, not 'ft2'"),
        (("--on-mismatch", "guess"), "on_mismatch must be 'error' or 'skip', not 'guess'"),
    ],
)
def test_bad_options_are_one_line(arguments: tuple[str, ...], message: str) -> None:
    assert re.search(message, refused(*UNIFY, *arguments))
    assert not Path("state").exists()


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"tasks": ["ft1"]}, r"tasks: expected a mapping of names to checkpoints, got \['ft1'\]"),
        ({"rule": "negative"}, "rule: expected FusionRule, got 'negative'"),
        ({"private": [1]}, "private: expected patterns as strings, got 1"),
        ({"options": {}}, r"options: expected Options, got \{\}"),
    ],
)
def test_wrong_types(wrong: dict[str, Any], message: str) -> None:
    given: dict[str, Any] = {"tasks": {"a": "ft1"}, "out": "state", **wrong}
    with pytest.raises((TypeError, ValueError), match=message):
        checkpoint.unify("base", **given)
    assert not Path("state").exists()


@pytest.mark.parametrize("wrong", [{"device": None}, {"workers": True}, {"max_memory": 1e9}])
def test_wrong_options(wrong: dict[str, Any]) -> None:
    (name,) = wrong
    with pytest.raises(ValueError, match=f"^{name} must be "):
        checkpoint.Options(**wrong)


def test_plan_for_a_disk_without_room(monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage(".")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=10_000))

    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    result = condu("plan", *UNIFY)
    assert result.exit_code == 0
    assert re.search(r"to write .* the disk must have free; it lacks 9\d\.\d\d kB", result.stdout)
    assert "writing is not measured" in result.stdout
    assert "No space left on device" in result.stderr
    assert not list(Path().glob(".condu*"))


def test_sizes_of_memory_are_taken_as_written(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int] = []
    known = memory.workers_and_elements

    def watch(job: object, options: object) -> tuple[int, int]:
        seen.append(options.max_memory)  # type: ignore[attr-defined]
        return known(job, options)  # type: ignore[arg-type]

    monkeypatch.setattr("condu.checkpoint.planning.workers_and_elements", watch)
    for text in ("2G", "2GiB", "1536M", "3000000000"):
        done("plan", *UNIFY, "--max-memory", text)
    assert seen == [2 << 30, 2 << 30, 1536 << 20, 3_000_000_000]


def test_debug_shows_where_it_happened() -> None:
    result = condu(*UNIFY[:-1], "base", "--debug")
    assert isinstance(result.exception, ValueError)  # not the end of the command after a line


def test_a_distributed_checkpoint_goes_out_and_in() -> None:
    done(*UNIFY)
    extract = ("extract", "state", "--base", "base", "--task", "a", "-o")
    done(*extract, "plain")
    done(*extract, "distributed", "--format", "dcp")
    assert (Path("distributed") / ".metadata").is_file()
    assert not list(Path("distributed").glob("*.safetensors*"))
    assert (Path("distributed") / "tokenizer.json").is_file()
    assert "--allow-pickle" in refused("unify", "distributed", "--task", "x=ft1", "-o", "other")
    done("unify", "distributed", "--task", "x=ft1", "-o", "other", "--allow-pickle")
    done("unify", "plain", "--task", "x=ft1", "-o", "same")
    found, expected = cx.UnifiedDelta.load("other"), cx.UnifiedDelta.load("same")
    assert found.base_fingerprints == expected.base_fingerprints
    assert all(torch.equal(found.delta[name], d) for name, d in expected.delta.items())
    assert not list(Path().glob("condu-*"))


def test_the_bar_is_for_terminals(capfd: pytest.CaptureFixture[str]) -> None:
    with progress_bar("state", shown=True) as progress:
        progress(10, 100)
    assert capfd.readouterr() == ("", "")


def test_the_bar_shows_speed_and_time_left() -> None:
    stream = io.StringIO()
    console = Console(file=stream, force_terminal=True, width=100)
    with progress_bar("state", shown=True, console=console) as progress:
        progress(0, 4_000_000)
        for _ in range(3):
            progress(1_000_000, 0)
            time.sleep(0.15)
    shown = re.sub("\x1b[^a-zA-Z]*[a-zA-Z]", "", stream.getvalue())
    assert re.search(r"state .* 3\.0/4\.0 MB \d+\.\d MB/s left \d:\d\d:\d\d", shown)


def test_processes_of_a_machine_take_a_gpu_each(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOCAL_RANK", "3")
    seen: list[object] = []

    def watch(job: object, options: Options) -> tuple[int, int]:
        seen.append(options.device)
        raise ValueError("enough")

    monkeypatch.setattr("condu.checkpoint.planning.workers_and_elements", watch)
    for device in ("cuda", "cuda:1", "cpu"):
        assert refused("plan", *UNIFY, "--device", device) == "enough"
    assert seen == ["cuda:3", "cuda:1", "cpu"]


def test_processes_that_do_not_come(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "many")
    assert refused(*UNIFY) == "the environment variable WORLD_SIZE must be a number, not 'many'"
    for name, value in (("WORLD_SIZE", "2"), ("RANK", "0"), ("MASTER_ADDR", "localhost")):
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("MASTER_PORT", "1234")
    monkeypatch.setattr(world, "_LATE", 0.1)

    def nobody(*arguments: object, **options: object) -> Any:
        time.sleep(0.5)
        raise RuntimeError("nobody came")

    monkeypatch.setattr(world.dist, "rendezvous", nobody)
    result = condu(*UNIFY)
    assert result.exit_code != 0
    assert "waiting at localhost:1234 for the 2 processes" in result.stderr
