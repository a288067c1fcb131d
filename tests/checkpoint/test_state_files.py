"""A state on disk read by ranges: what comes out, and what is refused when it is opened."""

from __future__ import annotations

import os
import random
import re
from pathlib import Path

import pytest
import torch
from small_states import TASKS, change_config, make_state, misfit, model, rewritten, save
from torch import Tensor

import condu_ext as cx
from condu.checkpoint import state_files
from condu.checkpoint.state_files import StateFiles
from condu_ext.manifest import CheckpointError


def read_delta(files: StateFiles, tensor: int, start: int, stop: int) -> Tensor:
    out = torch.full((stop - start,), torch.nan, dtype=files.manifest.dtype)
    files.read_delta(tensor, start, stop, out)
    return out


def read_bits(files: StateFiles, task: int, tensor: int, start: int, stop: int) -> Tensor:
    out = torch.full(((stop - start + 7) // 8,), 0xAA, dtype=torch.uint8)
    files.read_bits(task, tensor, start, stop, out)
    return out


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    return save(make_state(), tmp_path / "s")


@pytest.mark.parametrize("rescale", ["global", "per_tensor"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shard_bytes", [1, 1000, 1 << 30])
def test_ranges_are_those_of_the_state(
    tmp_path: Path, dtype: torch.dtype, rescale: str, shard_bytes: int
) -> None:
    state = make_state(dtype=dtype, rescale=rescale)
    save(state, tmp_path, shard_bytes)
    cuts = random.Random(0)
    with StateFiles(tmp_path) as files:
        tensors = files.manifest.spec.tensors
        assert [task.name for task in files.manifest.tasks] == list(TASKS)
        assert sorted(k for shard in files.shards for k in shard) == list(range(len(tensors)))
        assert len(files.shards) == files.manifest.shards
        for k, entry in enumerate(tensors):
            delta = state.delta[entry.name].reshape(-1)
            packed = [state.packed_mask(task)[entry.name] for task in TASKS]
            for _ in range(5):
                start = cuts.randrange(entry.numel + 1) // 8 * 8
                stop = cuts.choice([entry.numel, cuts.randrange(start, entry.numel + 1) // 8 * 8])
                stop = max(start, stop)
                assert torch.equal(read_delta(files, k, start, stop), delta[start:stop])
                for t, bits in enumerate(packed):
                    found = read_bits(files, t, k, start, stop)
                    assert torch.equal(found, bits[start // 8 : (stop + 7) // 8])
        for t, task in enumerate(TASKS):
            lambdas = state.rescaler(task)
            for k, entry in enumerate(tensors):
                expected = lambdas[entry.name] if isinstance(lambdas, dict) else lambdas
                assert float(files.rescaler[t, k]) == expected
        files.check_sums()


def test_shards_are_in_the_order_of_the_places(saved: Path) -> None:
    """What is read in this order is read from front to back."""
    with StateFiles(saved) as files:
        assert len(files.shards) > 2
        assert any(len(shard) > 1 for shard in files.shards)
        for shard in files.shards:
            places = [(files._delta[k].file, files._delta[k].offset) for k in shard]
            assert places == sorted(places)


def test_private_tensors(saved: Path) -> None:
    with StateFiles(saved) as files:
        for t in range(len(TASKS)):
            head = model(t + 1)["head"]
            assert {n: s.shape for n, s in files.private(t).items()} == {"head": tuple(head.shape)}
            out = torch.empty(4, dtype=torch.float64)
            files.read_private(t, "head", 3, 7, out)
            assert torch.equal(out, head.reshape(-1)[3:7])


@pytest.mark.parametrize("numel", [3, 0])
def test_states_without_tasks(tmp_path: Path, numel: int) -> None:
    cx.UnifiedDelta.empty({"w": torch.ones(numel)}).save(tmp_path)
    with StateFiles(str(tmp_path)) as files:
        assert files.rescaler.shape == (0, 1)
        assert files.shards == [[0]]
        assert torch.equal(read_delta(files, 0, 0, numel), torch.zeros(numel))
        files.check_sums()


def test_dropped_tasks_leave_gaps_in_the_numbers(tmp_path: Path) -> None:
    state = make_state()
    state.drop("cars")
    save(state, tmp_path)
    change_config(tmp_path, lambda config: config["tasks"].reverse())
    with StateFiles(tmp_path) as files:
        assert [task.name for task in files.manifest.tasks] == ["pets", "food"]
        k = [entry.name for entry in files.manifest.spec.tensors].index("text.w")
        assert torch.equal(read_bits(files, 0, k, 0, 2000), state.packed_mask("pets")["text.w"])


# ---- what is refused -----------------------------------------------------------------------------


def test_nothing_there(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=re.escape(str(tmp_path))):
        StateFiles(tmp_path)


def test_files_that_are_gone_or_of_another_size(saved: Path) -> None:
    for file in sorted(saved.glob("*.safetensors")):
        good = file.read_bytes()
        for bad in (b"", good[:-1], good + b"\0"):
            file.write_bytes(bad)
            with pytest.raises(CheckpointError, match=f"{file.name}: {len(bad)} bytes, expected"):
                StateFiles(saved)
        file.unlink()
        with pytest.raises(FileNotFoundError, match=file.name):
            StateFiles(saved)
        file.write_bytes(good)
    StateFiles(saved).close()


def test_changed_bytes_are_found_by_checksums_alone(saved: Path) -> None:
    with StateFiles(saved) as files:
        for number, file in enumerate(files.files):
            good = file.read_bytes()
            file.write_bytes(good[:-1] + bytes([good[-1] ^ 1]))
            StateFiles(saved).close()
            with pytest.raises(CheckpointError, match=f"{file.name}: checksum"):
                files.check_sums()
            files.check_sums(lambda k: k != number)  # noqa: B023
            file.write_bytes(good)
        files.check_sums()


@pytest.mark.parametrize("kind", ["unified", "triggers"])
@pytest.mark.parametrize("change", ["shape", "dtype", "missing", "extra", "twice", "garbage"])
def test_headers_that_do_not_fit(saved: Path, kind: str, change: str) -> None:
    name = "scale"
    if change == "garbage":
        file = sorted(saved.glob(f"{kind}-*"))[0]
        file.write_bytes(b"\xff" * file.stat().st_size)
        name = "not a valid safetensors file"
    elif change == "twice":
        with rewritten(saved, kind, "scale") as tensors:
            scale = tensors["scale"]
        with rewritten(saved, kind, "vision.0.attn.w") as tensors:
            tensors["scale"] = scale
    else:
        misfit(saved, kind, change)
        name = "more" if change == "extra" else "scale"
    with pytest.raises(CheckpointError, match=f"{kind}-1-.*{name}"):
        StateFiles(saved)
    with pytest.raises(CheckpointError, match=f"{kind}-1-.*{name if change != 'garbage' else ''}"):
        cx.UnifiedDelta.load(saved)


def test_a_file_that_is_not_listed(saved: Path) -> None:
    name = sorted(saved.glob("triggers-1-1-*"))[1].name
    change_config(saved, lambda config: config["files"].pop(name))
    with pytest.raises(CheckpointError, match=f"config.json: does not list {name}"):
        StateFiles(saved)


def test_a_state_that_is_replaced_while_it_is_opened(
    saved: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The new state is opened instead; a file that is missing for good is still an error."""
    newer = make_state(dtype=torch.bfloat16)
    writes = [lambda: newer.drop("food"), lambda: save(newer, saved)]

    def read_header(file: Path) -> object:
        while writes:
            writes.pop(0)()
        return real(file)

    real = state_files.read_header
    monkeypatch.setattr(state_files, "read_header", read_header)
    with StateFiles(saved) as files:
        assert files.manifest.generation == 2
        assert [task.name for task in files.manifest.tasks] == ["cars", "pets"]
        assert read_delta(files, 0, 0, 8).dtype == torch.bfloat16
    os.unlink(sorted(saved.glob("unified-*"))[-1])
    with pytest.raises(FileNotFoundError, match="unified-2"):
        StateFiles(saved)
