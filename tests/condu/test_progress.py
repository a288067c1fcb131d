"""Bars on a terminal, and nothing where there is none."""

from __future__ import annotations

import io
import re
from pathlib import Path

import pytest
from rich.console import Console
from tiny_run import tiny_benchmark, tiny_clip, tiny_trainer

from condu.progress import RunProgress


def terminal() -> Console:
    return Console(file=io.StringIO(), force_terminal=True, width=100, color_system=None)


def shown(console: Console) -> str:
    """What was written, without the codes that move the cursor."""
    assert isinstance(console.file, io.StringIO)
    return re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", console.file.getvalue())


def test_steps_show_the_loss_and_images_do_not() -> None:
    console = terminal()
    progress = RunProgress(console)
    with progress.steps("training", 2) as advance:
        advance(0.12345)
        advance(0.5)
    assert re.search(r"training .* 2/2 +loss 0\.500 .* left", shown(console))
    with progress.images("encoding", 50) as advance_by:
        advance_by(20)
        advance_by(30)
    assert re.search(r"encoding .* 50/50 +\d:\d\d:\d\d left", shown(console))


@pytest.mark.parametrize("quiet", [True, False])
def test_nothing_is_shown_where_nobody_looks(quiet: bool) -> None:
    console = terminal() if quiet else Console(file=io.StringIO())
    progress = RunProgress(console, quiet=quiet)
    with progress.steps("training", 2) as advance, progress.images("encoding", 2) as advance_by:
        advance(0.5)
        advance_by(2)
    assert shown(console) == ""


def test_an_evaluator_shows_how_many_images_it_has_encoded() -> None:
    console, benchmark = terminal(), tiny_benchmark()
    evaluator = tiny_clip().evaluator(benchmark, batch_size=32)
    evaluator.progress = RunProgress(console)
    evaluator.accuracy(benchmark["hues"])
    assert "90/90" in shown(console)


def test_a_run_shows_both(tmp_path: Path) -> None:
    console = terminal()
    trainer = tiny_trainer(tmp_path, methods=["individual"], training={"steps": 2})
    trainer.progress = RunProgress(console)
    trainer.run()
    assert "fine-tuning on hues" in shown(console)
    assert "encoding images" in shown(console)
