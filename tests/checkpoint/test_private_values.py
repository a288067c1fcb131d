"""What private tensors may hold: anything but NaN."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from range_models import data_bytes, model, moved, save
from small_states import rewritten

import condu_ext as cx
from condu import checkpoint
from condu.checkpoint.verifying import verify

DTYPES = [torch.float64, torch.float8_e4m3fn, torch.complex64]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_nan_is_refused(tmp_path: Path, dtype: torch.dtype) -> None:
    base = model(0)
    where = save(base, tmp_path / "base.safetensors")
    head = {"head": torch.ones(5).to(dtype), "mask": torch.full((2,), -torch.inf)}
    good = save(moved(base, 1) | head, tmp_path / "good.safetensors")
    head["head"] = torch.tensor([1, torch.nan]).to(dtype)
    bad = save(moved(base, 2) | head, tmp_path / "bad.safetensors")
    state, private = tmp_path / "state", ["head", "mask"]
    with pytest.raises(ValueError, match="task 'bad', private tensor 'head': has NaN"):
        checkpoint.unify(where, {"good": good, "bad": bad}, state, private=private)
    assert not state.exists()
    checkpoint.unify(where, {"good": good}, state, private=private)
    before = data_bytes(state)
    with pytest.raises(ValueError, match="task 'bad', private tensor 'head': has NaN"):
        checkpoint.absorb(state, "bad", bad, base=where)
    assert data_bytes(state) == before
    assert verify(state) == []
    assert cx.UnifiedDelta.load(state).tasks == ("good",)


def test_nan_is_found(tmp_path: Path) -> None:
    tuned = {"w": torch.ones(9), "scale": torch.ones(3), "steps": torch.arange(3)}
    cx.unify({"a": tuned}, {"w": torch.zeros(9)}, private=["s*"]).save(tmp_path)
    assert verify(tmp_path) == []
    with rewritten(tmp_path, "private", "scale") as private:
        private["scale"][2] = torch.nan
    (fault,) = verify(tmp_path)
    assert fault.endswith("task 'a', private tensor 'scale' has NaN values")
