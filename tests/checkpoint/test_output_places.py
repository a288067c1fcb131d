"""Where commands write: what is no place for a state or a model is refused before any work."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from runs import contents, leftovers
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from condu import checkpoint
from condu.checkpoint import Options
from condu.checkpoint.planning import plan
from condu.checkpoint.states import prepare_unify
from condu.cli import app
from condu_ext import FusionRule


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A base folder, a fine-tuned file, a state of it; commands run in their folder."""
    monkeypatch.chdir(tmp_path)
    Path("base").mkdir()
    save_file({"w": torch.zeros(5)}, "base/model.safetensors", {"format": "pt"})
    Path("base/config.json").write_text(json.dumps({"model_type": "none"}))
    save_file({"w": torch.ones(5)}, "tuned.safetensors")
    checkpoint.unify("base", {"a": "tuned.safetensors"}, "state")
    return tmp_path


def extract(out: str | Path, base: str = "base") -> None:
    checkpoint.extract("state", "a", out, base=base)


def test_model_in_the_current_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    Path("empty").mkdir()
    monkeypatch.chdir("empty")
    for out in (".", tmp_path / "empty"):
        with pytest.raises(ValueError, match="is the current folder; name a new one"):
            checkpoint.extract(tmp_path / "state", "a", out, base=tmp_path / "base")
    assert not list(tmp_path.glob(".*"))


def test_model_in_a_folder_that_is_a_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    Path("disk").mkdir()
    monkeypatch.setattr(Path, "is_mount", lambda path: path.name == "disk")
    with pytest.raises(ValueError, match="disk is a disk of its own; name a folder on it"):
        extract("disk")
    extract("disk/model")


def test_model_through_a_link() -> None:
    Path("real").mkdir()
    Path("link").symlink_to("real")
    extract("link")
    assert load_file("real/model.safetensors")["w"].tolist() == [1] * 5
    assert Path("link").is_symlink()
    Path("dangling").symlink_to("elsewhere")
    extract("dangling")
    assert contents(Path("elsewhere")) == contents(Path("real"))


def test_empty_paths(monkeypatch: pytest.MonkeyPatch) -> None:
    """As of a variable that is not set; they do not mean the current folder."""
    empty = ""
    monkeypatch.chdir("state")
    before = contents(Path())
    there = Path("..").resolve()
    tasks = {"b": there / "tuned.safetensors"}
    for call in (
        lambda: checkpoint.unify(there / "base", tasks, empty),
        lambda: checkpoint.unify(empty, tasks, there / "new"),
        lambda: checkpoint.unify(there / "base", {"b": empty}, there / "new"),
        lambda: checkpoint.absorb(empty, "b", tasks["b"], base=there / "base"),
        lambda: checkpoint.absorb(there / "state", "b", tasks["b"], empty, base=there / "base"),
        lambda: checkpoint.merge(there / "state", empty, there / "new"),
        lambda: checkpoint.extract(empty, "a", there / "new", base=there / "base"),
        lambda: checkpoint.extract(there / "state", "a", empty, base=there / "base"),
    ):
        with pytest.raises(ValueError, match=r"^(out|state|model): the path is empty$"):
            call()
    extract = ["extract", "--base", str(there / "base"), "--task", "a"]
    for arguments in ([*extract, str(there / "state"), "-o", empty], [*extract, empty, "-o", "x"]):
        result = CliRunner().invoke(app, arguments)
        assert result.exit_code == 2
        assert "the path is empty" in result.stderr
    assert contents(Path()) == before


def test_state_in_the_folder_of_something_else() -> None:
    tasks = {"a": "tuned.safetensors"}
    before = contents(Path())
    with pytest.raises(ValueError, match="base is one of the models; name a new folder"):
        checkpoint.unify("base", tasks, "base")
    Path("texts").mkdir()
    Path("texts/config.json").write_text("{}")
    with pytest.raises(ValueError, match="texts holds something else; name a new folder"):
        checkpoint.unify("base", tasks, "texts")
    Path("texts/config.json").unlink()
    assert contents(Path()) == before


def test_state_among_models() -> None:
    """A state's files beside a model's would make that one unreadable."""
    tasks = {"a": "tuned.safetensors"}
    Path("base/config.json").unlink()
    Path("other").mkdir()
    save_file({"w": torch.zeros(5)}, "other/model-00001-of-00002.safetensors")
    Path("link").symlink_to("base")
    before = leftovers(Path())
    for out in ("base", "link"):
        with pytest.raises(ValueError, match="is one of the models; name a new folder"):
            checkpoint.unify("base", tasks, out)
    message = r"other holds a model \(model-00001-of-00002\.safetensors\)"
    with pytest.raises(ValueError, match=message):
        checkpoint.unify("base", tasks, "other")
    with pytest.raises(ValueError, match=message):
        checkpoint.absorb("state", "b", "tuned.safetensors", "other", base="base")
    assert leftovers(Path()) == before


def test_odd_files_beside_the_base(monkeypatch: pytest.MonkeyPatch) -> None:
    """They neither stop a command nor hang it; and models of their own are not copied."""
    base = Path("base")
    (base / "gone").symlink_to("nowhere")
    os.mkfifo(base / "pipe")
    (base / "secret").write_text("")
    (base / "processor").mkdir()
    (base / "processor" / "words.txt").write_text("a b")
    for other in ("state", "processor/other"):
        checkpoint.unify(base, {"a": "tuned.safetensors"}, base / other)
    access = os.access
    monkeypatch.setattr(os, "access", lambda p, mode: p.name != "secret" and access(p, mode))
    lines: list[str] = []
    options = checkpoint.Options(report=lines.append)
    checkpoint.extract("state", "a", "expert", base=base, options=options)
    assert leftovers(Path("expert")) == [
        "config.json", "model.safetensors", "processor", "processor/words.txt"
    ]  # fmt: skip
    assert [line.split()[0] for line in lines] == ["base/gone", "base/pipe", "base/secret"]


def test_private_tensors_need_room(monkeypatch: pytest.MonkeyPatch) -> None:
    """They are counted before the work: in a plan, and where the disk is asked for room."""
    for name, value in (("base/model", 0.0), ("tuned", 1.0)):
        tensors = {"w": torch.full((5,), value), "head": torch.full((250_000,), value)}
        save_file(tensors, f"{name}.safetensors")
    tasks = {task: "tuned.safetensors" for task in "abc"}
    make = {"rule": FusionRule(), "dtype": torch.float32, "private": ("head",)}
    with prepare_unify("base", tasks, "new", options=Options(), **make) as prepared:  # type: ignore[arg-type]
        expected = plan(prepared)
    usage = shutil.disk_usage(".")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=2_900_000))
    message = r"3\.00 MB are to be written, but the disk has 2\.90 MB free"
    with pytest.raises(OSError, match=message):
        checkpoint.unify("base", tasks, "new", private=["head"])
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    costs = checkpoint.unify("base", tasks, "new", private=["head"])
    size = sum(file.stat().st_size for file in Path("new").glob("*.safetensors"))
    assert expected.written == size
    assert size - 2000 < costs.written <= size
    assert expected.read == costs.read
    assert costs.read - 3_000_000 in range(80, 400)


def test_one_file_under_the_name_that_is_looked_for() -> None:
    shutil.copy("base/model.safetensors", "anything.safetensors")
    extract("expert", base="anything.safetensors")
    extract("expert.safetensors", base="anything.safetensors")
    assert leftovers(Path("expert")) == ["model.safetensors"]
    shutil.move("base/model.safetensors", "base/open_clip_model.safetensors")
    extract("like the base")
    assert leftovers(Path("like the base")) == ["config.json", "open_clip_model.safetensors"]
