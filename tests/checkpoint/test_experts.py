"""What a task's expert is written as: the order of its tensors, and what lies beside them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from apart import together
from range_models import load, model, moved, save
from torch import Tensor

from condu import checkpoint
from condu.checkpoint import extracting
from condu.checkpoint.tensor_files import read_header

WORDS = ("kiwi", "fig", "plum", "lime", "pear", "date", "nut", "sloe")
HEADS = [f"head.{word}.weight" for word in WORDS]


@pytest.fixture
def headed(tmp_path: Path) -> dict[str, Tensor]:
    """A state of task "a", which has heads that the base lacks; its fine-tuned model."""
    base = model(0)
    tuned = moved(base, 1) | {name: torch.randn(k, 3) for k, name in enumerate(HEADS)}
    checkpoint.unify(
        save(base, tmp_path / "base.safetensors"),
        {"a": save(tuned, tmp_path / "a.safetensors")},
        tmp_path / "state",
        private=["head.*"],
    )
    return tuned


def extract(folder: Path, out: Path) -> None:
    checkpoint.extract(folder / "state", "a", out, base=folder / "base.safetensors")


def test_heads_that_the_base_lacks(tmp_path: Path, headed: dict[str, Tensor]) -> None:
    extract(tmp_path, tmp_path / "expert")
    expert = load(tmp_path / "expert")
    assert expert.keys() == headed.keys()
    for name in HEADS:
        assert torch.equal(expert[name], headed[name])
    # in the order of their file, which every process of a run sees, whatever it hashes names to
    (private,) = (tmp_path / "state").glob("private-*")
    (written,) = (tmp_path / "expert").glob("*.safetensors")
    heads = [name for name in read_header(written) if name in HEADS and headed[name].numel()]
    assert heads == [name for name in read_header(private) if headed[name].numel()]


def extract_in_another_order(folder: Path) -> None:
    """A command of several processes, of which one would put tensors elsewhere."""
    if torch.distributed.get_rank() == 1:
        entries = extracting._entries

        def turned(*arguments: Any) -> Any:
            found, shards = entries(*arguments)
            return found, [shard[::-1] for shard in shards]

        extracting._entries = turned
    extract(folder, folder / "expert")


def test_processes_agree_on_the_layout(tmp_path: Path, headed: dict[str, Tensor]) -> None:
    before = sorted(tmp_path.iterdir())
    for end in together(2, extract_in_another_order, tmp_path):
        assert isinstance(end.error, ValueError)
        assert "the layout of the model" in str(end.error)
    assert sorted(tmp_path.iterdir()) == before
