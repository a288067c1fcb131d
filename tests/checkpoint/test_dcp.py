from __future__ import annotations

import os
import pickle
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from reading import Harm, assert_same_bits, values
from safetensors.torch import save_file
from tiny_models import llama
from torch import Tensor
from torch.distributed.checkpoint import DefaultSavePlanner, FileSystemReader, SavePlan
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, Metadata, MetadataIndex
from torch.distributed.checkpoint.planner import WriteItem, WriteItemType

from condu.checkpoint import dcp as ours
from condu.checkpoint.dcp import write_dcp
from condu.checkpoint.sources import Source, open_source

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")


class Shards(DefaultSavePlanner):
    """Saves each matrix in two parts, as two ranks would: uneven rows, or columns."""

    def create_local_plan(self) -> SavePlan:
        plan = super().create_local_plan()
        plan.items[:] = [part for item in plan.items for part in self._parts(item)]
        return plan

    def _parts(self, item: WriteItem) -> list[WriteItem]:
        data = item.tensor_data
        if data is None or len(data.size) < 2:
            return [item]
        dim = 0 if data.size[0] % 3 else 1
        cut = data.size[dim] // 3
        parts = []
        for i, (start, length) in enumerate([(0, cut), (cut, data.size[dim] - cut)]):
            offsets, sizes = [0, 0], list(data.size)
            offsets[dim], sizes[dim] = start, length
            chunk = ChunkStorageMetadata(torch.Size(offsets), torch.Size(sizes))
            index = MetadataIndex(item.index.fqn, offsets, i)
            kind = type(data)(chunk=chunk, properties=data.properties, size=data.size)
            parts.append(WriteItem(index, WriteItemType.SHARD, tensor_data=kind))
        return parts

    def resolve_data(self, write_item: WriteItem) -> Any:
        if write_item.type != WriteItemType.SHARD:
            return super().resolve_data(write_item)
        assert write_item.tensor_data is not None
        chunk = write_item.tensor_data.chunk
        tensor = self.lookup_object(MetadataIndex(write_item.index.fqn))
        for dim, (start, length) in enumerate(zip(chunk.offsets, chunk.sizes, strict=True)):
            tensor = tensor.narrow(dim, start, length)
        return tensor.contiguous()


def saved(state: dict[str, Any], folder: Path, planner: DefaultSavePlanner | None = None) -> Path:
    dcp.save(state, checkpoint_id=folder, planner=planner, no_dist=True)
    return folder


def opened(folder: Path, scratch: Path | None = None) -> Source:
    return open_source(folder, allow_pickle=True, scratch=scratch)


@pytest.fixture
def state(tmp_path: Path) -> dict[str, Tensor]:
    return llama(tmp_path / "hf", seed=0, dtype=torch.bfloat16).state_dict()


@pytest.mark.parametrize("together", [1, 10_000, 10**9])
@pytest.mark.parametrize("under", [None, "model", "state_dict"])
def test_shards_are_put_together(
    tmp_path: Path, state: Any, under: str | None, together: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ours, "_STAGED_TOGETHER", together)
    state = {"flag": torch.tensor([True]), **state, "module.step": torch.tensor(7)}
    state |= {"empty": torch.empty(0, 3), "wide": torch.randn(5, 7)}
    content = {under: state, "epoch": 3, "optim": {"lr": [torch.ones(2)]}} if under else state
    source = opened(saved(content, tmp_path / "dcp", Shards()), tmp_path)
    assert {file.name for file in source.files} == {".metadata", "__0_0.distcp"}
    state["step"] = state.pop("module.step")
    assert source.tensors.keys() == state.keys()
    for name, tensor in state.items():
        assert_same_bits(values(source, name, tensor.numel() // 3), tensor)
        assert source.tensors[name].offset % tensor.itemsize == 0  # type: ignore[attr-defined]
    source.close()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["dcp", "hf"]


def test_the_copy_is_made_once_by_the_first_read(
    tmp_path: Path, state: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "scratch").mkdir()
    source = opened(saved(state, tmp_path / "dcp"), tmp_path / "scratch")
    reads = []
    read_data = FileSystemReader.read_data
    monkeypatch.setattr(
        FileSystemReader, "read_data", lambda *args: (reads.append(1), read_data(*args))[1]
    )
    assert not [file for file in (tmp_path / "scratch").rglob("*") if file.is_file()]
    with ThreadPoolExecutor(4) as pool:
        for name, found in zip(state, pool.map(lambda n: values(source, n), state), strict=True):
            assert_same_bits(found, state[name])
    assert reads == [1]
    source.close()
    assert not list((tmp_path / "scratch").iterdir())


def test_a_model_turned_into_dcp_is_one_for_torch(tmp_path: Path, state: Any) -> None:
    texts = {p.name for p in (tmp_path / "hf").iterdir() if "safetensors" not in p.name}
    write_dcp(tmp_path / "hf")
    assert {p.name for p in (tmp_path / "hf").iterdir()} == texts | {".metadata", "__0_0.distcp"}
    found = {name: torch.full_like(tensor, 9) for name, tensor in state.items()}
    dcp.load(found, checkpoint_id=tmp_path / "hf", no_dist=True)
    for name, tensor in state.items():
        assert_same_bits(found[name], tensor)
    source = opened(tmp_path / "hf")
    assert source.tensors.keys() == state.keys()
    source.close()


def test_tensors_of_every_kind_are_written(tmp_path: Path) -> None:
    state = {"b": torch.tensor([True]), "x": torch.randn(3, dtype=torch.float64)}
    state |= {"scalar": torch.tensor(2.5), "empty": torch.empty(2, 0), "i": torch.arange(5)}
    save_file(state, tmp_path / "all.safetensors")
    write_dcp(tmp_path)
    source = opened(tmp_path)
    for name, tensor in state.items():
        assert_same_bits(values(source, name), tensor)
    source.close()


@pytest.mark.skipif(sys.platform == "win32", reason="sets a limit of the process")
def test_where_dcp_cannot_be_written_the_files_stay(tmp_path: Path, state: Any) -> None:
    before = {path.name for path in (tmp_path / "hf").iterdir()}
    code = (
        "import resource, signal, sys\n"
        "from pathlib import Path\n"
        "from condu.checkpoint.dcp import write_dcp\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))\n"
        "try:\n    write_dcp(Path(sys.argv[1]))\n"
        "except OSError as error:\n    sys.exit(f'{type(error).__name__}: {error}')\n"
    )
    result = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "hf")], capture_output=True, text=True
    )
    assert "OSError: [Errno 27]" in result.stderr
    assert before <= {path.name for path in (tmp_path / "hf").iterdir()}


def test_pickles_are_refused_unless_allowed(tmp_path: Path, state: Any) -> None:
    with pytest.raises(ValueError, match=r"dcp: .*pickles.*--allow-pickle"):
        open_source(saved(state, tmp_path / "dcp"))


def change(folder: Path, edit: Any) -> None:
    """Let ``edit`` change the metadata of a folder."""
    metadata: Metadata = FileSystemReader(folder).read_metadata()
    edit(metadata)
    (folder / ".metadata").write_bytes(pickle.dumps(metadata))


def test_metadata_can_run_nothing(tmp_path: Path, state: Any) -> None:
    folder = saved(state, tmp_path / "dcp")

    def harm(metadata: Metadata) -> None:
        metadata.planner_data = Harm(tmp_path / "harm")

    change(folder, harm)
    with pytest.raises(ValueError, match=r"\.metadata: is no metadata \(it asks for \w+\.mkdir\)"):
        opened(folder)
    # a class of an allowed module that leads elsewhere
    name = "torch.distributed.checkpoint.metadata\nos.mkdir"
    (folder / ".metadata").write_bytes(f"c{name}\n(V{tmp_path / 'harm'}\ntR.".encode())
    with pytest.raises(ValueError, match=r"it asks for .*os\.mkdir"):
        opened(folder)
    assert not (tmp_path / "harm").exists()


@pytest.mark.parametrize(
    ("state", "message"),
    [
        ({"model": {"x": torch.ones(1), "extra": 3}}, "entry 'model.extra' is no tensor"),
        ({"x": torch.ones(1), "epoch": 3}, "entry 'epoch' is no tensor"),
        ({"x": torch.ones(1), "module.x": torch.ones(1)}, "canonical name 'x'"),
        ({}, "holds no tensors"),
        ({"x": torch.ones(1, dtype=torch.complex128)}, "torch.complex128"),
    ],
)
def test_what_is_no_model_is_refused(tmp_path: Path, state: Any, message: str) -> None:
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    with pytest.raises(ValueError, match=rf"dcp: .*{message}"):
        opened(saved(state, tmp_path / "dcp"), scratch)
    assert not list(scratch.iterdir())


def test_damaged_folders(tmp_path: Path) -> None:
    folder = saved({"x": torch.randn(4, 3)}, tmp_path / "dcp", Shards())

    def message(kind: type[Exception]) -> str:
        with pytest.raises(kind) as error:
            values(opened(folder), "x")
        assert "\n" not in str(error.value)
        return str(error.value)

    metadata, data = folder / ".metadata", folder / "__0_0.distcp"
    whole = metadata.read_bytes()

    def lose_a_part(found: Metadata) -> None:
        del found.state_dict_metadata["x"].chunks[0]  # type: ignore[union-attr]

    change(folder, lose_a_part)
    assert "'x' has 12 elements, its parts 9" in message(ValueError)

    def lead_elsewhere(found: Metadata) -> None:
        for info in found.storage_data.values():
            info.relative_path = "../other"

    metadata.write_bytes(whole)
    change(folder, lead_elsewhere)
    assert ".metadata: names '../other', which is not in its folder" in message(ValueError)
    for damaged in (b"", whole[:100], pickle.dumps({}), b"junk"):
        metadata.write_bytes(damaged)
        assert ".metadata: is no metadata" in message(ValueError)
    metadata.write_bytes(whole)
    bytes_of_data = data.read_bytes()
    data.write_bytes(bytes_of_data[: len(bytes_of_data) // 2])
    assert "dcp: " in message(ValueError)
    data.unlink()
    assert "no file '__0_0.distcp'" in message(FileNotFoundError)


def test_a_full_disk_is_an_error_and_leaves_nothing(
    tmp_path: Path, state: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "scratch").mkdir()
    source = opened(saved(state, tmp_path / "dcp"), tmp_path / "scratch")

    def full(*_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(OSError, match=r"No space left on device: '.*scratch"):
        values(source, "model.norm.weight")
    source.close()
    assert not list((tmp_path / "scratch").iterdir())
