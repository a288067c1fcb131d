"""Where commands write: what is no place for a state or a model is refused before any work."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from runs import contents
from safetensors.torch import load_file, save_file

from condu import checkpoint


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
