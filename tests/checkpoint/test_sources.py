"""What a name given by a user leads to."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from fnmatch import fnmatch
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import clip, llama, llava

from condu.checkpoint.sources import open_source
from condu.terminal import errors


class Hub:
    """Stands in for the hub: a folder for each model, and what was asked for."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.asked: list[tuple[str, str | None]] = []

    def snapshot_download(
        self,
        repo_id: str,
        *,
        revision: str | None = None,
        allow_patterns: list[str],
        ignore_patterns: list[str],
    ) -> str:
        from huggingface_hub.errors import LocalEntryNotFoundError

        self.asked.append((repo_id, revision))
        source = self.root / repo_id
        if not source.is_dir():
            raise LocalEntryNotFoundError("Cannot reach it.\nPlease check your connection.")
        target = self.root / "cache" / repo_id.replace("/", "--")
        for file in source.rglob("*"):
            name = file.relative_to(source).as_posix()
            wanted = any(fnmatch(name, pattern) for pattern in allow_patterns)
            if file.is_file() and wanted and not any(fnmatch(name, p) for p in ignore_patterns):
                (target / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(file, target / name)
        return str(target)

    def fetched(self, repo_id: str) -> set[str]:
        folder = self.root / "cache" / repo_id.replace("/", "--")
        return {file.relative_to(folder).as_posix() for file in folder.rglob("*") if file.is_file()}


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Hub:
    import huggingface_hub

    hub = Hub(tmp_path)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", hub.snapshot_download)
    monkeypatch.chdir(tmp_path)
    return hub


def test_a_model_of_the_hub_with_all_that_belongs_to_it(hub: Hub) -> None:
    folder = hub.root / "org" / "vlm-1.5"
    llava(folder, seed=0)
    texts = ("qwen.tiktoken", "modeling_vlm.py", "vocab.bpe", "LICENSE", "1_Pooling/config.json")
    for name in texts:
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text("{}")
    whole = {f.relative_to(folder).as_posix() for f in folder.rglob("*") if f.is_file()}
    (folder / "onnx").mkdir()
    for other in (
        "onnx/m.safetensors",
        "consolidated.safetensors",
        "pytorch_model.bin",
        "a.gguf",
        "b.onnx_data",
    ):
        (folder / other).write_bytes(b"other")
    source = open_source("org/vlm-1.5")  # a path too, here
    assert hub.asked == []
    os.rename("org", "elsewhere")
    hub.root = hub.root / "elsewhere"
    shutil.move(hub.root / "vlm-1.5", hub.root / "org" / "vlm-1.5")
    found = open_source("org/vlm-1.5@v2.0", allow_pickle=True)
    assert found.where == "org/vlm-1.5@v2.0"
    assert set(hub.asked) == {("org/vlm-1.5", "v2.0")}
    assert found.tensors.keys() == source.tensors.keys()
    assert hub.fetched("org/vlm-1.5") == whole


def test_pickles_are_fetched_only_where_there_is_nothing_else(hub: Hub) -> None:
    folder = hub.root / "models" / "org" / "old"
    folder.mkdir(parents=True)
    hub.root = hub.root / "models"
    torch.save({"x": torch.ones(2)}, folder / "pytorch_model.bin")
    (folder / "config.json").write_text("{}")
    with pytest.raises(ValueError, match=r"holds no model.*config\.json"):
        open_source("org/old")
    assert hub.fetched("org/old") == {"config.json"}
    assert open_source("org/old", allow_pickle=True).tensors.keys() == {"x"}
    save_file({"y": torch.ones(2)}, folder / "model.safetensors")
    assert open_source("org/old", allow_pickle=True).tensors.keys() == {"y"}


def test_what_the_hub_does_not_give_is_one_clause(
    hub: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    import huggingface_hub
    from huggingface_hub import errors

    response = Mock(headers={})
    said = {
        "cannot be reached": errors.LocalEntryNotFoundError("Cannot find it.\nCheck."),
        "has none of that name, or a private one": errors.RepositoryNotFoundError(
            "404 Client Error.\n\nRepository Not Found", response=response
        ),
        "gives it only to those whom its owner lets": errors.GatedRepoError(
            "403.\nGated", response=response
        ),
        "says RuntimeError: odd things": RuntimeError("odd\n things"),
    }
    for reason, error in said.items():
        monkeypatch.setattr(huggingface_hub, "snapshot_download", Mock(side_effect=error))
        with pytest.raises(FileNotFoundError) as raised:
            open_source("org/none")
        line = f"org/none: no such file or folder, and the Hugging Face hub {reason}"
        assert str(raised.value) == line


@pytest.mark.parametrize(
    "name", ["nowhere", "a/b/c", "./a/b", "/a/b", "a/b.safetensors", "a/b.pt", "a/b@", "a/b@c@d"]
)
def test_what_can_only_be_a_path_is_not_asked_of_the_hub(hub: Hub, name: str) -> None:
    with pytest.raises(FileNotFoundError, match=f"{name}: no such file"):
        open_source(name)
    assert hub.asked == []


def test_folders_without_a_model(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    with pytest.raises(ValueError, match=r"/a: holds no model.*but nothing at all"):
        open_source(tmp_path / "a")
    (tmp_path / "a" / "model.gguf").write_bytes(b"GGUF")
    (tmp_path / "a" / "model.safetensors").mkdir()
    with pytest.raises(ValueError, match=r"/a: holds no model.*but model\.gguf, model\.safe"):
        open_source(tmp_path / "a")


def test_what_would_never_end_is_not_read(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(ValueError, match="pipe: is neither a file nor a folder"):
        open_source(tmp_path / "pipe")
    (tmp_path / "model.safetensors.index.json").write_text('{"weight_map": {"x": "pipe"}}')
    with pytest.raises(FileNotFoundError, match="'pipe', but there is no such file"):
        open_source(tmp_path)


def test_a_folder_is_opened_without_pickles_where_there_is_a_choice(tmp_path: Path) -> None:
    llama(tmp_path / "m", seed=0)
    torch.save({"x": torch.ones(1)}, tmp_path / "m" / "pytorch_model.bin")
    assert "x" not in open_source(tmp_path / "m", allow_pickle=True).tensors


@pytest.mark.parametrize(
    "content", [b"GGUF\x03\0\0\0" + b"\0" * 64, b"\x89HDF\r\n\x1a\n" + b"\0" * 64, b"\0" * 64]
)
@pytest.mark.parametrize("name", ["model.gguf", "model.safetensors", "model.bin"])
def test_foreign_files_are_named(tmp_path: Path, name: str, content: bytes) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=rf"{name}: not a valid safetensors file"):
        open_source(tmp_path / name, allow_pickle=True)


def test_a_file_is_what_it_holds_and_not_what_it_is_called(tmp_path: Path) -> None:
    # headers of a length that begins as a pickle or a zip file does
    for length in (0x0280, 0x0480, int.from_bytes(b"PK\x03\x04", "little")):
        text = b'{"x":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}'.ljust(length)
        file = tmp_path / "model.bin"
        file.write_bytes(length.to_bytes(8, "little") + text + b"1234")
        assert open_source(file).tensors.keys() == load_file(file).keys() == {"x"}
    clip(tmp_path / "a.pt", seed=0)
    os.rename(tmp_path / "a.pt", tmp_path / "a.safetensors")
    with pytest.raises(ValueError, match=r"a\.safetensors: the weights are pickled"):
        open_source(tmp_path / "a.safetensors")


def test_without_permission() -> None:
    """As root, whom nothing stops, in the shoes of somebody else."""
    user = os.geteuid()
    with TemporaryDirectory() as parent:
        os.chmod(parent, 0o755)
        folder = Path(parent, "m")
        llama(folder, seed=0)
        for file in folder.iterdir():
            file.chmod(0o644)
        file = next(folder.glob("*-00002-of-*"))
        for path in (file, folder):
            path.chmod(0)
            os.seteuid(user or 65534)
            try:
                with pytest.raises(PermissionError, match=rf"{path}['/]"):
                    open_source(folder)
            finally:
                os.seteuid(user)
            path.chmod(0o755)


def test_an_empty_name_is_not_the_current_folder(tmp_path: Path, monkeypatch: Any) -> None:
    llama(tmp_path, seed=0)
    monkeypatch.chdir(tmp_path)
    assert open_source(".").tensors
    with pytest.raises(ValueError, match="name of a model is empty"):
        open_source("")


def test_a_missing_library_is_named(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import typer

    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(typer.Exit), errors("unify", debug=False):
        open_source("org/name")
    assert capsys.readouterr().err == (
        'error: condu unify needs huggingface_hub: pip install "condu[train]"\n'
    )


def test_plain_models_need_the_core_alone() -> None:
    code = (
        "import sys, condu.checkpoint.sources, condu.checkpoint.pickles, condu.checkpoint.hub\n"
        "import condu.checkpoint.dcp\n"
        "extra = {'peft', 'transformers', 'huggingface_hub', 'open_clip'} & sys.modules.keys()\n"
        "sys.exit(' '.join(extra) or 0)"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (result.returncode, result.stderr) == (0, "")
