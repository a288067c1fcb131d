"""`condu verify`: what is wrong with a state is found, all of it, and where."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from small_states import change_config, make_state, misfit, model, rewritten, save
from typer.testing import CliRunner

import condu_ext as cx
from condu.checkpoint import tensor_files, verifying
from condu.checkpoint.verifying import verify
from condu.state_commands import app
from condu_ext import storage
from condu_ext.manifest import CheckpointError, read_manifest


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    return save(make_state(), tmp_path / "s")


def run(*arguments: Any) -> tuple[int, list[str], str]:
    """Exit status, lines of the output, and errors."""
    result = CliRunner().invoke(app, ["verify", *map(str, arguments)])
    return result.exit_code, result.stdout.splitlines(), result.stderr


def the_only(faults: list[str]) -> str:
    assert len(faults) == 1, faults
    return faults[0]


@pytest.mark.parametrize("rescale", ["global", "tensor_mean", "per_tensor"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shard_bytes", [1000, 1 << 30])
def test_whole_states(tmp_path: Path, rescale: str, dtype: torch.dtype, shard_bytes: int) -> None:
    """After unify, absorb and drop too."""
    state = make_state(rescale=rescale, dtype=dtype)
    cx.absorb_(state, "more", model(7), model(0))
    state.drop("food")
    assert verify(save(state, tmp_path, shard_bytes)) == []
    status, lines, _ = run(tmp_path)
    assert (status, lines) == (0, [f"{tmp_path}: whole"])


@pytest.mark.filterwarnings("ignore:task")
@pytest.mark.parametrize("rescale", ["global", "per_tensor"])
def test_dead_tasks_are_whole(tmp_path: Path, rescale: str) -> None:
    weak = {"a": torch.ones(9), "b": torch.full((9,), -1.0)}
    strong = {"a": torch.full((9,), -3.0), "b": torch.full((9,), -3.0)}
    still = {"a": torch.zeros(9), "b": torch.zeros(9)}
    rule = cx.FusionRule(rescale=rescale)
    cx.unify({"weak": weak, "strong": strong, "still": still}, None, rule=rule).save(tmp_path)
    assert verify(tmp_path) == []


def test_states_without_tasks(tmp_path: Path) -> None:
    cx.UnifiedDelta.empty({"w": torch.ones(3), "none": torch.ones(0)}).save(tmp_path)
    assert verify(tmp_path) == []


# ---- damage --------------------------------------------------------------------------------------


def test_every_kind_of_damaged_file(saved: Path) -> None:
    for file in sorted(saved.glob("*.safetensors")):
        good = file.read_bytes()
        for bad, text in (
            (good[:-1], f"{file}: {len(good) - 1} bytes, expected {len(good)}"),
            (good[:-1] + bytes([good[-1] ^ 1]), f"{file}: checksum "),
        ):
            file.write_bytes(bad)
            assert text in verify(saved)[0]
        file.unlink()
        fault = the_only(verify(saved))
        assert "No such file" in fault
        assert str(file) in fault
        file.write_bytes(good)
    assert verify(saved) == []


def test_all_that_is_wrong_is_listed(saved: Path) -> None:
    files = sorted(saved.glob("*.safetensors"))
    for file in files:
        file.write_bytes(file.read_bytes() + b"\0")
    change_config(saved, lambda config: config["tasks"][1].update(rescaler=[2.0] * 7))
    status, lines, errors = run(saved)
    assert (status, errors) == (1, "")
    assert len(lines) == len(files) + 1
    for file, line in zip(
        files, sorted(line for line in lines if ".safetensors" in line), strict=True
    ):
        assert line.startswith(f"{file}: ")
    assert "task 'food'" in lines[-1]


@pytest.mark.parametrize("kind", ["unified", "triggers"])
@pytest.mark.parametrize("change", ["shape", "dtype", "missing", "extra", "header"])
def test_headers_that_do_not_fit(saved: Path, kind: str, change: str) -> None:
    if change == "header":
        file = sorted(saved.glob(f"{kind}-*"))[0]
        size = file.stat().st_size
        file.write_bytes(b"\xff" * size)
        change_config(
            saved,
            lambda c: c["files"][file.name].update(xxh3=storage.file_fingerprint(file)),
        )
        assert re.search(f"{file.name}: not a valid safetensors file", the_only(verify(saved)))
        return
    misfit(saved, kind, change)
    faults = verify(saved)
    assert all(kind in fault for fault in faults)
    assert ("'more'" if change == "extra" else "'scale'") in faults[0]


def test_a_private_file_that_is_none(saved: Path) -> None:
    file = saved / "private-1-1-00001-of-00001.safetensors"
    file.write_bytes(b"\xff" * 99)
    entry = {"size": 99, "xxh3": storage.file_fingerprint(file)}
    change_config(saved, lambda config: config["files"].update({file.name: entry}))
    assert "not a valid safetensors file" in the_only(verify(saved))


def test_files_that_are_not_listed(saved: Path) -> None:
    names = [sorted(saved.glob(f"{kind}-*"))[0].name for kind in ("unified", "triggers")]
    change_config(saved, lambda config: [config["files"].pop(name) for name in names])
    assert verify(saved) == [f"{saved / 'config.json'}: does not list {name}" for name in names]


@pytest.mark.parametrize("piece", [7, 1 << 20])
def test_values_that_are_not_finite(
    saved: Path, monkeypatch: pytest.MonkeyPatch, piece: int
) -> None:
    monkeypatch.setattr(tensor_files, "PIECE", piece)
    with rewritten(saved, "unified", "text.w") as tensors:
        tensors["text.w"][0, 0] = torch.nan
        tensors["text.w"][0, -2:] = torch.tensor([torch.inf, -torch.inf])
    assert "tensor 'text.w' has 3 NaN or infinite values" in the_only(verify(saved))


def test_bits_past_the_end(saved: Path) -> None:
    with rewritten(saved, "triggers-1-2", "vision.0.attn.b") as tensors:
        tensors["vision.0.attn.b"][-1] |= 0b10
    fault = the_only(verify(saved))
    assert "task 'pets', tensor 'vision.0.attn.b': bits past the end of the mask are set" in fault


@pytest.mark.filterwarnings("ignore:task")
def test_bits_of_a_task_whose_rescaler_is_0(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tensor_files, "PIECE", 4)
    models = {"weak": {"w": torch.ones(99)}, "strong": {"w": torch.full((99,), -3.0)}}
    cx.unify(models, None).save(tmp_path)
    with rewritten(tmp_path, "triggers-1-0", "w") as tensors:
        tensors["w"][6] = 1
    assert "task 'weak', tensor 'w': bits of the mask are set, but λ is 0" in the_only(
        verify(tmp_path)
    )


@pytest.mark.parametrize("field", ["rescaler", "num", "den"])
@pytest.mark.parametrize("rescale", ["global", "tensor_mean", "per_tensor"])
def test_rescalers_that_do_not_follow_from_the_sums(
    tmp_path: Path, field: str, rescale: str
) -> None:
    save(make_state(rescale=rescale), tmp_path)

    def change(config: dict[str, Any]) -> None:
        config["tasks"][2][field][0] *= 1.001

    change_config(tmp_path, change)
    fault = the_only(verify(tmp_path))
    assert "config.json: task 'pets', tensor 'vision.0.attn.w': λ is " in fault


def test_what_cannot_be_read_at_all(saved: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    status, lines, errors = run(tmp_path / "empty")
    assert (status, lines, len(errors.splitlines())) == (2, [], 1)
    assert "holds no unified checkpoint" in errors
    change_config(saved, lambda config: config["tasks"][0]["num"].__setitem__(0, -1.0))
    with pytest.raises(CheckpointError, match="'num'"):
        verify(saved)
    assert run(saved)[0] == 2


def test_a_state_that_is_replaced_meanwhile(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What was missing of the old state is no damage of the new one."""
    newer = [make_state(dtype=torch.bfloat16)]

    def read_then_replace(directory: Path) -> object:
        manifest = read_manifest(directory)
        if newer:
            save(newer.pop(), saved)
        return manifest

    monkeypatch.setattr(verifying, "read_manifest", read_then_replace)
    assert verify(saved) == []


# ---- the base model ------------------------------------------------------------------------------


def save_base(path: Path, **changes: Any) -> Path:
    tensors = model(0) | changes
    save_file({n: t.contiguous().clone() for n, t in tensors.items() if t is not None}, path)
    return path


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return save_base(tmp_path / "base.safetensors")


def test_the_base_that_was_recorded(saved: Path, base: Path) -> None:
    status, lines, _ = run(saved, "--base", base)
    assert (status, lines) == (0, [f"{saved}: whole, and over {base}"])
    # a file with one of two tied tensors, as Hugging Face's are, under either name
    assert verify(saved, save_base(base, tied=None)) == []
    assert verify(saved, save_base(base, **{"vision.0.attn.b": None})) == []


def test_bases_that_differ(saved: Path, base: Path) -> None:
    """Everything that differs, and a damaged state besides."""
    text = model(0)["text.w"]
    text[0, 1999] += 1e-6
    changes: dict[str, Any] = {
        "text.w": text,
        "scale": None,
        "vision.0.attn.w": torch.zeros(7, 30),
        "vision.1.attn.w": model(0)["vision.1.attn.w"].double(),
    }
    save_base(base, **changes)
    file = sorted(saved.glob("triggers-*"))[0]
    file.write_bytes(file.read_bytes()[:-1])
    status, lines, errors = run(saved, "--base", base)
    assert (status, errors) == (1, "")
    found = {line.removeprefix(f"{base}, ") for line in lines[1:]}
    other = "differs from the base model (tiny) that the state was made over"
    assert found == {
        "tensor 'scale': is missing",
        "tensor 'vision.0.attn.w': shape [7, 30], the state's is [30, 7]",
        f"tensor 'vision.1.attn.w': {other}",
        f"tensor 'text.w': {other}",
    }
    assert str(file) in lines[0]


@pytest.mark.parametrize("piece", [1, 64, 1000])
def test_fingerprints_of_tensors_of_several_pieces(
    saved: Path, base: Path, monkeypatch: pytest.MonkeyPatch, piece: int
) -> None:
    monkeypatch.setattr(tensor_files, "PIECE", piece)
    assert verify(saved, base) == []


def test_states_without_fingerprints(tmp_path: Path, base: Path) -> None:
    state = make_state()
    state.base_fingerprints = {}
    save(state, tmp_path)
    with pytest.raises(ValueError, match="no fingerprint of its base model"):
        verify(tmp_path, base)
    assert verify(tmp_path) == []
    state.record_base(model(0))
    del state.base_fingerprints["scale"]
    save(state, tmp_path)
    assert the_only(verify(tmp_path, base)).endswith("'scale': the state has no fingerprint of it")


def test_a_base_that_is_not_there(saved: Path, tmp_path: Path) -> None:
    status, lines, errors = run(saved, "--base", tmp_path / "nowhere")
    assert (status, lines, len(errors.splitlines())) == (2, [], 1)
