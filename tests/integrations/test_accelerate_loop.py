"""accelerate needs no callback: every process absorbs, one saves."""

from __future__ import annotations

from pathlib import Path

from accelerate_loop import TASKS, small_model, train
from states import assert_same, contents
from two_processes import run_on_two

from condu import ConDU


def test_two_processes_absorb_what_one_would(tmp_path: Path) -> None:
    first, second = run_on_two(train, tmp_path)
    assert first["wrapper"] == "DistributedDataParallel"
    assert_same(second, first)
    assert_same(first["prepared"], first["bare"])
    assert_same(first["saved"], first["bare"])

    model = small_model()
    fusion = ConDU(model)
    for task in TASKS:
        model.load_state_dict(first["finetuned"][task])
        assert fusion.moved()
        fusion.absorb(task)
    assert_same(first["bare"], contents(fusion.state))
