"""Models whose results go past the caches, on every instruction set (large_probe.py)."""

from __future__ import annotations

from pathlib import Path

import pytest
from kernel_cases import needs_memory
from test_instruction_sets import run_with


@pytest.mark.parametrize("isa", ["avx512", "avx2", "baseline"])
def test_equal_to_its_parts(isa: str) -> None:
    needs_memory(4 << 30)
    done = run_with(isa, str(Path(__file__).with_name("large_probe.py")))
    if "names no instruction set of this machine" in done.stderr:
        pytest.skip(f"this machine has no {isa}")
    assert done.returncode == 0, done.stderr
