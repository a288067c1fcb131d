"""Models that are copied to be read: distributed checkpoints in commands."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from apart import apart
from range_models import assert_same, model, moved

import condu_ext as cx
from condu import checkpoint
from condu.checkpoint import Options
from condu.checkpoint.dcp import DistributedSource
from condu.checkpoint.planning import plan
from condu.checkpoint.scratch import ScratchFile
from condu.checkpoint.states import prepare_unify

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")


@pytest.fixture(autouse=True)
def models(tmp_path: Path) -> None:
    base = model(0)
    dcp.save(base, checkpoint_id=tmp_path / "base", no_dist=True)
    dcp.save(moved(base, 1), checkpoint_id=tmp_path / "a", no_dist=True)


def unify(folder: Path, **options: Any) -> None:
    checkpoint.unify(
        folder / "base",
        {"a": folder / "a"},
        folder / "state",
        options=Options(allow_pickle=True, **options),
    )


def killed_after_copying(folder: Path) -> None:
    import os

    def copied(self: DistributedSource, *_: Any) -> None:
        self._staged()
        os.kill(os.getpid(), 9)

    DistributedSource.read = copied  # type: ignore[method-assign]
    unify(folder)


def test_killed_runs_leave_one_copy_and_the_next_none(tmp_path: Path) -> None:
    before = sorted(tmp_path.iterdir())
    left = []
    for _ in range(2):
        assert apart(killed_after_copying, tmp_path).status == -9
        left.append([p for p in sorted(tmp_path.iterdir()) if p not in before])
    assert len(left[0]) == 1
    assert left[0] == left[1]
    unify(tmp_path)
    assert sorted(tmp_path.iterdir()) == [*before, tmp_path / "state"]
    expected = cx.unify({"a": moved(model(0), 1)}, model(0))
    expected.record_base(model(0))
    assert_same(tmp_path / "state", expected)


def test_files_of_runs_at_the_same_time(tmp_path: Path) -> None:
    first, second, other = (ScratchFile(purpose, tmp_path) for purpose in ("a", "a", "b"))
    assert len({first.path, second.path, other.path}) == 3
    first.path.write_bytes(b"mine")
    again = ScratchFile("a", tmp_path)
    assert first.path.read_bytes() == b"mine"
    first.close()
    after = ScratchFile("a", tmp_path)
    assert after.path == first.path
    for file in (second, other, again, after):
        file.close()
    assert not [path for path in tmp_path.iterdir() if path.is_file()]


def test_a_plan_copies_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(DistributedSource, "_staged", None)
    with prepare_unify(
        tmp_path / "base",
        {"a": tmp_path / "a"},
        tmp_path / "state",
        rule=cx.FusionRule(),
        dtype=torch.float32,
        private=(),
        options=Options(allow_pickle=True),
    ) as prepared:
        found = plan(prepared)
    stored = sum(t.nbytes for t in model(0).values())
    assert 2 * stored < found.staged < 2 * stored + 4096  # and two headers
    assert found.read == prepared.job.reads + found.staged + prepared.copied
    assert found.seconds is found.fuse_rate is None
    text = "\n".join(found.lines())
    assert "to copy before" in text
    assert "not measured" in text
    assert not (tmp_path / "state").exists()


def test_parts_that_are_larger_than_memory(tmp_path: Path) -> None:
    vast = {"w": torch.zeros(64 << 20)}  # 256 MiB
    dcp.save(vast, checkpoint_id=tmp_path / "vast", no_dist=True)
    before = sorted(tmp_path.iterdir())
    with pytest.raises(ValueError, match=r"max_memory: 250 MiB .*vast, which has parts of 256 MiB"):
        checkpoint.unify(
            tmp_path / "vast",
            {"a": tmp_path / "vast"},
            tmp_path / "state",
            options=Options(allow_pickle=True, max_memory=250 << 20),
        )
    assert sorted(tmp_path.iterdir()) == before
