"""`python -m condu.checkpoint`, what torchrun starts."""

from __future__ import annotations

import subprocess
import sys


def test_only_commands_for_checkpoints_are_offered() -> None:
    run = [sys.executable, "-m", "condu.checkpoint", "--help"]
    text = subprocess.run(run, check=True, capture_output=True, text=True).stdout
    words = set(text.split())
    assert {"unify", "absorb", "merge", "extract", "plan", "inspect", "verify"} <= words
    assert not {"demo", "bench", "report"} & words
