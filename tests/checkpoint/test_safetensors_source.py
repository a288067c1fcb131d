from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from reading import assert_same_bits, values
from safetensors.torch import load_file, save_file
from tiny_models import change_index, clip, llama, llava

from condu.checkpoint.safetensors_source import SafetensorsSource
from condu.checkpoint.sources import open_source


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    llama(tmp_path / "model", seed=0)
    return tmp_path / "model"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("make", [llama, llava])
def test_a_sharded_folder_holds_what_was_saved(tmp_path: Path, make: Any, dtype: Any) -> None:
    make(tmp_path / "model", seed=0, dtype=dtype)
    saved: dict[str, torch.Tensor] = {}
    for file in (tmp_path / "model").glob("*.safetensors"):
        saved |= load_file(file)
    source = open_source(str(tmp_path / "model"))
    assert isinstance(source, SafetensorsSource)
    assert len(source.weights) > 1
    assert list(source.weights) == sorted((tmp_path / "model").glob("*.safetensors"))
    assert source.files == source.weights
    assert (source.where, source.folder) == (str(tmp_path / "model"), tmp_path / "model")
    assert source.index == tmp_path / "model" / "model.safetensors.index.json"
    assert not source.is_delta
    assert source.tensors.keys() == saved.keys()
    for name, tensor in saved.items():
        assert_same_bits(values(source, name, 1, tensor.numel() // 2), tensor)
    source.close()


def test_one_file_and_a_folder_with_one_file(tmp_path: Path) -> None:
    model = clip(tmp_path / "folder" / "weights.safetensors", seed=0)
    for where in (tmp_path / "folder" / "weights.safetensors", tmp_path / "folder"):
        source = open_source(where)
        assert isinstance(source, SafetensorsSource)
        assert source.index is None
        assert source.folder == (where if where.is_dir() else None)
        for name, tensor in model.state_dict().items():
            assert_same_bits(values(source, name), tensor)
        source.close()


def test_every_dtype_is_listed_and_read(tmp_path: Path) -> None:
    dtypes = [torch.float64, torch.float16, torch.int64, torch.uint8, torch.bool]
    dtypes += [torch.float8_e4m3fn, torch.float8_e5m2]
    tensors = {str(d): torch.arange(6).view(2, 3).to(d) for d in dtypes}
    tensors["empty"], tensors["scalar"] = torch.empty(0, 3), torch.tensor(2.5)
    save_file(tensors, tmp_path / "all.safetensors")
    source = open_source(tmp_path / "all.safetensors")
    for name, tensor in tensors.items():
        assert source.tensors[name].shape == tuple(tensor.shape)
        assert_same_bits(values(source, name), tensor)
    source.close()


def test_tensors_are_in_the_order_of_their_places(folder: Path) -> None:
    source = open_source(folder)
    assert isinstance(source, SafetensorsSource)
    places = [(source.weights.index(t.file), t.offset) for t in source.tensors.values()]
    assert places == sorted(places)


def test_links_out_of_the_folder_are_followed_as_in_the_hub_s_cache(folder: Path) -> None:
    blobs = folder.parent / "blobs"
    blobs.mkdir()
    for i, file in enumerate(sorted(folder.glob("*.safetensors*"))):
        os.rename(file, blobs / f"{i}")
        file.symlink_to(Path("..", "blobs", f"{i}"))
    source = open_source(folder)
    assert values(source, "model.norm.weight").eq(1).all()
    source.close()


def test_which_file_of_several_is_read(folder: Path) -> None:
    """As transformers chooses: model.safetensors, its index, then whatever is the only one."""
    other = {"x": torch.ones(1)}
    save_file(other, folder / "consolidated.safetensors")
    assert "model.norm.weight" in open_source(folder).tensors
    save_file(other, folder / "model.safetensors")
    assert open_source(folder).tensors.keys() == {"x"}
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors.index.json").rename(folder / "other.safetensors.index.json")
    assert "model.norm.weight" in open_source(folder).tensors
    (folder / "more.safetensors.index.json").write_text("{}")
    with pytest.raises(ValueError, match=r"several indexes \(more.*, other"):
        open_source(folder)
    for index in folder.glob("*.index.json"):
        index.unlink()
    with pytest.raises(ValueError, match=r"without an index \(consolidated.*, model-00001"):
        open_source(folder)


def test_a_tensor_that_no_index_lists_counts_as_in_transformers(folder: Path) -> None:
    change_index(folder, {"model.norm.weight": None})
    assert "model.norm.weight" in open_source(folder).tensors


@pytest.mark.parametrize(
    "name", ["../x.safetensors", "/etc/passwd", "a/../../x", "..\\x", "C:\\x", "", 7, ["a"]]
)
def test_an_index_cannot_name_files_elsewhere(folder: Path, name: Any) -> None:
    change_index(folder, {"model.norm.weight": name})
    with pytest.raises(ValueError, match=r"index\.json: the file of tensor 'model\.norm\.weight'"):
        open_source(folder)


def test_an_index_that_does_not_fit_its_files(folder: Path) -> None:
    change_index(folder, {"model.norm.weight": "model-00009.safetensors"})
    with pytest.raises(FileNotFoundError, match=r"'model\.norm\.weight' is in 'model-00009"):
        open_source(folder)
    first, second = (file.name for file in sorted(folder.glob("*.safetensors"))[:2])
    change_index(folder, {"model.norm.weight": first})
    with pytest.raises(ValueError, match=rf"'model\.norm\.weight' in '{first}', which lacks it"):
        open_source(folder)
    change_index(folder, {"model.norm.weight": None, "lost": second})
    with pytest.raises(ValueError, match=rf"lists tensor 'lost' in '{second}', which lacks it"):
        open_source(folder)


def test_a_tensor_in_two_files_is_refused(folder: Path) -> None:
    first, second = sorted(folder.glob("*.safetensors"))[:2]
    save_file(load_file(first) | load_file(second), second)
    with pytest.raises(ValueError, match=r"tensor '.*' is in .*00001-of.* and in .*00002-of"):
        open_source(folder)


@pytest.mark.parametrize(
    "text", ["", "{", "[]", "{}", '{"weight_map": []}', '{"weight_map": {}}', "[" * 10**6, "\xff"]
)
def test_damaged_indexes(folder: Path, text: str) -> None:
    (folder / "model.safetensors.index.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(ValueError, match=r"model\.safetensors\.index\.json: (is no JSON|has no)"):
        open_source(folder)


def header(content: object, *, length: int | None = None, data: bytes = b"") -> bytes:
    text = content if isinstance(content, bytes) else json.dumps(content).encode()
    return (len(text) if length is None else length).to_bytes(8, "little") + text + data


def entry(*offsets: int, shape: Any = (2,), dtype: str = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


DAMAGED = {
    "empty": b"",
    "short": b"\x01\x02",
    "huge header": header({}, length=2**60),
    "header past the end": header({"a": entry(0, 8)}, length=10**6),
    "no JSON": header(b"{nonsense"),
    "JSON of another kind": header([1, 2]),
    "truncated": header({"a": entry(0, 8)}, data=b"1234"),
    "too long": header({"a": entry(0, 8)}, data=b"1" * 12),
    "overlapping": header({"a": entry(0, 8), "b": entry(4, 12)}, data=b"1" * 12),
    "hole": header({"a": entry(0, 8), "b": entry(12, 20)}, data=b"1" * 20),
    "twice": header(b'{"a":%b,"a":%b}' % ((json.dumps(entry(0, 8)).encode(),) * 2), data=b"1" * 16),
    "wrong shape": header({"a": entry(0, 8, shape=(3,))}, data=b"1" * 8),
    "negative shape": header({"a": entry(0, 8, shape=(-2,))}, data=b"1" * 8),
    "overflowing shape": header({"a": entry(0, 8, shape=(2**40, 2**40))}, data=b"1" * 8),
    "unknown dtype": header({"a": entry(0, 8, dtype="Q7")}, data=b"1" * 8),
    "deep": header(b'{"a":' * 10**4),
}


@pytest.mark.parametrize("what", DAMAGED)
def test_damaged_files_are_named(tmp_path: Path, what: str) -> None:
    file = tmp_path / "bad.safetensors"
    file.write_bytes(DAMAGED[what])
    with pytest.raises(ValueError, match=r"bad\.safetensors: ") as error:
        open_source(file)
    assert "\n" not in str(error.value)


def test_a_file_that_shrinks_while_it_is_read(tmp_path: Path) -> None:
    file = tmp_path / "a.safetensors"
    save_file({"x": torch.ones(1000)}, file)
    source = open_source(file)
    os.truncate(file, 500)
    with pytest.raises(OSError, match=r"a\.safetensors: ends at byte 500"):
        values(source, "x")
    source.close()
