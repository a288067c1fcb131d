"""Optional parts of ``config.json``."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import condu_ext as cx
from condu_ext.manifest import CheckpointError, read_manifest


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    cx.unify({"a": {"w": torch.ones(5), "b": torch.ones(2, 3)}}, None).save(tmp_path)
    return tmp_path


def write(folder: Path, **values: Any) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | values))


def test_zero_sums_are_kept(saved: Path) -> None:
    manifest = read_manifest(saved)
    assert manifest.zero_sums is None  # fused in memory: not counted
    (saved / "config.json").write_text(replace(manifest, zero_sums=[5, 0]).to_json())
    assert read_manifest(saved).zero_sums == [5, 0]
    assert cx.UnifiedDelta.load(saved).tasks == ("a",)


def test_configs_from_before_there_were_zero_sums(saved: Path) -> None:
    manifest = read_manifest(saved)
    config = json.loads((saved / "config.json").read_text())
    del config["zero_sums"]
    (saved / "config.json").write_text(json.dumps(config))
    assert read_manifest(saved) == manifest


@pytest.mark.parametrize(
    "value", [[1], [1, 2, 3], [-1, 0], [6, 0], [0, True], [0.0, 1], ["0", 1], [None, 1], 3, {}]
)
def test_zero_sums_that_count_nothing(saved: Path, value: Any) -> None:
    write(saved, zero_sums=value)
    with pytest.raises(CheckpointError, match=r"config\.json: 'zero_sums'"):
        read_manifest(saved)
