"""States made in memory know tensors under several names; files have one of them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from range_models import load, model, moved, save
from torch import Tensor

import condu_ext as cx
from condu import checkpoint
from condu.checkpoint.verifying import verify


def tied(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return tensors | {"alias": tensors["matrix"]}


def under_the_other(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {"alias" if name == "matrix" else name: t for name, t in tensors.items()}


@pytest.fixture
def state(tmp_path: Path) -> cx.UnifiedDelta:
    """Of task "a", also saved as "state"."""
    made = cx.unify({"a": tied(moved(model(0), 1))}, tied(model(0)))
    made.record_base(tied(model(0)))
    made.save(tmp_path / "state")
    assert set(made.spec.aliases) == {"alias"}
    return made


def test_files_may_have_the_other_name(tmp_path: Path, state: cx.UnifiedDelta) -> None:
    base = save(under_the_other(model(0)), tmp_path / "base.safetensors")
    tuned = moved(model(0), 2)
    file = save(under_the_other(tuned), tmp_path / "b.safetensors")
    checkpoint.absorb(tmp_path / "state", "b", file, base=base)
    expected = cx.absorb(state, "b", tuned, model(0))
    found = cx.UnifiedDelta.load(tmp_path / "state")
    assert found.delta["matrix"].any()
    for name, delta in expected.delta.items():
        assert torch.equal(found.delta[name], delta), name
    checkpoint.extract(tmp_path / "state", "b", tmp_path / "expert", base=base)
    values = cx.decouple(expected, "b", model(0))
    assert torch.equal(load(tmp_path / "expert")["alias"], values["matrix"])
    assert not verify(tmp_path / "state", base)


def test_states_that_tie_otherwise_do_not_merge(tmp_path: Path, state: cx.UnifiedDelta) -> None:
    other = cx.unify({"b": moved(model(0), 2)}, model(0))
    other.record_base(model(0))
    other.save(tmp_path / "other")
    with pytest.raises(ValueError, match=r"differ in tied tensors: \{'alias': 'matrix'\} and \{\}"):
        checkpoint.merge(tmp_path / "state", tmp_path / "other", tmp_path / "both")
    assert not (tmp_path / "both").exists()
