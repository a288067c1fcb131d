"""Tasks that end with λ = 0 though some of their mask bits were elected."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from range_models import assert_same, save

import condu_ext as cx
from condu import checkpoint
from condu.checkpoint.verifying import verify
from condu_ext.layout import CHUNK


def test_differences_too_small_for_the_state(tmp_path: Path) -> None:
    """fp32 has subnormals below bfloat16's: the bits are set, and then u is rounded to 0."""
    base = {"w": torch.zeros(CHUNK + 9), "x": torch.zeros(3)}
    tasks = {"small": {name: t + 2.0**-140 for name, t in base.items()}}
    with pytest.warns(UserWarning, match="'small' was outvoted on every parameter"):
        checkpoint.unify(
            save(base, tmp_path / "base.safetensors"),
            {"small": save(tasks["small"], tmp_path / "small.safetensors")},
            tmp_path / "state",
            dtype=torch.bfloat16,
        )
    assert verify(tmp_path / "state") == []  # checksums are those of the cleared masks
    with pytest.warns(UserWarning, match="'small' was outvoted"):
        expected = cx.unify(tasks, base, dtype=torch.bfloat16)
    expected.record_base(base)
    assert_same(tmp_path / "state", expected)
    assert not any(bits.any() for bits in expected.mask("small").values())
