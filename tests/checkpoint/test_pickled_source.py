from __future__ import annotations

import json
import pickle
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from reading import Harm, assert_same_bits, values
from tiny_models import clip, llama
from torch import Tensor

from condu.checkpoint.pickles import copy_range
from condu.checkpoint.sources import Source, open_source


def opened(path: Path) -> Source:
    return open_source(path, allow_pickle=True)


def save(content: object, path: Path) -> Path:
    torch.save(content, path)
    return path


def test_a_training_checkpoint_is_the_model_in_it(tmp_path: Path) -> None:
    model = clip(tmp_path / "epoch_3.pt", seed=0)
    source = opened(tmp_path / "epoch_3.pt")
    assert source.files == [tmp_path / "epoch_3.pt"]
    assert source.tensors.keys() == model.state_dict().keys()
    for name, tensor in model.state_dict().items():
        assert_same_bits(values(source, name, tensor.numel() // 3), tensor)
    source.close()


@pytest.mark.parametrize("wrap", [lambda d: d, lambda d: {"model": d, "optimizer": [1]}])
def test_parameters_of_every_dtype(tmp_path: Path, wrap: Any) -> None:
    tensors = {str(d): torch.arange(6).to(d) for d in (torch.float64, torch.bfloat16, torch.int32)}
    tensors["parameter"] = torch.nn.Parameter(torch.randn(3))
    tensors["_orig_mod.scalar"] = torch.tensor(1.5)
    source = opened(save(wrap(tensors), tmp_path / "a.bin"))
    assert source.tensors["scalar"].shape == ()
    for name, tensor in tensors.items():
        assert_same_bits(values(source, name.removeprefix("_orig_mod.")), tensor.detach())


def test_pickles_are_refused_unless_allowed(tmp_path: Path) -> None:
    file = save({"x": torch.ones(1)}, tmp_path / "model.pt")
    index = {"weight_map": {"x": "model.pt"}}
    (tmp_path / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match=r"model\.pt: .* pickled.*--allow-pickle"):
        open_source(file)
    with pytest.raises(ValueError, match=r"bin\.index\.json: .* pickled.*--allow-pickle"):
        open_source(tmp_path)


def test_a_pickle_that_runs_something_is_refused_and_does_not(tmp_path: Path) -> None:
    file = save({"x": torch.ones(1), "y": Harm(tmp_path / "harm")}, tmp_path / "bad.pt")
    with pytest.raises(ValueError, match=r"bad\.pt: torch\.load .*GLOBAL \w+\.mkdir"):
        opened(file)
    assert not (tmp_path / "harm").exists()
    save({"x": torch.ones(1), "y": np.float64(1)}, file)
    with pytest.raises(ValueError, match=r"bad\.pt: torch\.load .*GLOBAL numpy\.[^\n]*$"):
        opened(file)


def test_tied_tensors_keep_their_first_name(tmp_path: Path) -> None:
    model = llama(tmp_path / "hf", seed=0, tied=True)
    state = model.state_dict()
    assert "lm_head.weight" in state
    assert opened(save(state, tmp_path / "a.pt")).tensors.keys() == (
        open_source(tmp_path / "hf").tensors.keys()
    )
    x = torch.randn(4, 4)  # the same memory, but not the same tensor
    both = {"x": x, "x.T": x.T, "row": x[0], "none": x[:0], "nothing": x[:0]}
    source = opened(save(both, tmp_path / "b.pt"))
    for name, tensor in both.items():
        assert_same_bits(values(source, name), tensor)


def test_folders_of_hugging_face_with_pickles(tmp_path: Path) -> None:
    first, second = {"a": torch.ones(2), "b": torch.ones(3)}, {"c": torch.zeros(2)}
    save(first, tmp_path / "pytorch_model-00001-of-00002.bin")
    save(second, tmp_path / "pytorch_model-00002-of-00002.bin")
    save({"lr": 1.0}, tmp_path / "training_args.bin")
    with pytest.raises(ValueError, match=r"several models \(pytorch_model-00001.*name the one"):
        opened(tmp_path)
    listed = {n: "pytorch_model-00001-of-00002.bin" for n in first}
    listed["c"] = "pytorch_model-00002-of-00002.bin"
    index = tmp_path / "pytorch_model.bin.index.json"
    index.write_text(json.dumps({"weight_map": listed}))
    source = opened(tmp_path)
    assert list(source.tensors) == ["a", "b", "c"]
    assert [file.name for file in source.files] == sorted(set(listed.values()))
    index.write_text(json.dumps({"weight_map": {**listed, "c": listed["a"]}}))
    with pytest.raises(ValueError, match=r"'c' in 'pytorch_model-00001.*', which lacks it"):
        opened(tmp_path)
    save({"d": torch.ones(1)}, tmp_path / "pytorch_model.bin")
    assert list(opened(tmp_path).tensors) == ["d"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([torch.ones(1)], "is of type list"),
        ({}, "is empty"),
        ({"state_dict": {}}, "is empty, expected tensors by name"),
        ({"a": torch.ones(1), "epoch": 3}, "entry 'epoch' is of type int"),
        ({1: torch.ones(1)}, "entry 1 is"),
        ({"a": torch.ones(2).to_sparse()}, "entry 'a' is a torch.sparse_coo Tensor"),
        ({"a": torch.empty(2, device="meta")}, "entry 'a' is a torch.strided Tensor .* on meta"),
        ({"a": torch.ones(1), "module.a": torch.ones(1)}, "same canonical name 'a'"),
    ],
)
def test_what_is_no_model_is_refused(tmp_path: Path, content: object, message: str) -> None:
    with pytest.raises(ValueError, match=rf"bad\.pt: .*{message}"):
        opened(save(content, tmp_path / "bad.pt"))


DAMAGED = {
    "truncated": lambda whole: whole[: len(whole) // 2],
    "no zip": lambda _: b"PK\x03\x04" + b"1" * 100,
    "a bare pickle": lambda _: pickle.dumps({"x": 1}),
    "a stopped pickle": lambda _: b"\x80\x04",
    "deep": lambda _: b"\x80\x02" + b"]" * 10 + b"(" * 10**5,
}


@pytest.mark.parametrize("what", DAMAGED)
def test_damaged_pickles_are_named(tmp_path: Path, what: str) -> None:
    file = save({"x": torch.ones(1000)}, tmp_path / "bad.pt")
    file.write_bytes(DAMAGED[what](file.read_bytes()))
    with pytest.raises(ValueError, match=r"bad\.pt: ") as error:
        opened(tmp_path / "bad.pt")
    assert "\n" not in str(error.value)


def test_the_old_format_cannot_be_mapped(tmp_path: Path) -> None:
    torch.save({"x": torch.ones(2)}, tmp_path / "a.pt", _use_new_zipfile_serialization=False)
    with pytest.raises(ValueError, match=r"a\.pt: .* before 1\.6.*save it again"):
        opened(tmp_path / "a.pt")


def strided() -> st.SearchStrategy[Tensor]:
    """Tensors in all layouts: permuted, cut, stepped, expanded."""

    def build(sizes: list[int], order: Any, steps: list[int], expand: int) -> Tensor:
        shape = [size * step for size, step in zip(sizes, steps, strict=True)]
        values = torch.arange(torch.Size(shape).numel()).view(shape).permute(order)
        values = values[tuple(slice(None, None, steps[i]) for i in order)]
        return values.unsqueeze(-1).expand(*values.shape, expand) if expand else values

    return st.integers(1, 3).flatmap(
        lambda dims: st.builds(
            build,
            st.lists(st.integers(1, 4), min_size=dims, max_size=dims),
            st.permutations(range(dims)),
            st.lists(st.integers(1, 2), min_size=dims, max_size=dims),
            st.integers(0, 3),
        )
    )


@given(strided(), st.data())
def test_ranges_of_tensors_in_any_layout(tensor: Tensor, data: Any) -> None:
    start = data.draw(st.integers(0, tensor.numel()))
    stop = data.draw(st.integers(start, tensor.numel()))
    out = torch.full((stop - start + 1,), -1)
    copy_range(tensor, start, stop, out)
    assert torch.equal(out[:-1], tensor.flatten()[start:stop])
    assert out[-1] == -1


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_no_copy_is_made_of_a_mapped_file(tmp_path: Path) -> None:
    size = 64 << 20
    file = save({"x": torch.ones(size // 4)}, tmp_path / "a.pt")

    def own_memory() -> int:
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(1024 * int(line.split()[1]) for line in lines if line.startswith("RssAnon"))

    before = own_memory()
    source = opened(file)
    out = torch.empty(1 << 16)
    for start in range(0, size // 4, 1 << 16):
        source.read("x", start, start + (1 << 16), out)
    assert own_memory() - before < size // 4
