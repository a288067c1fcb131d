"""What the CUDA compiler made of the kernels: registers, and the width of the loads.

The build keeps its objects, and what ptxas said of each, in build/kernels-*. Where the extension
was built elsewhere or without CUDA there is nothing to look at.
"""

from __future__ import annotations

import importlib.util
import re
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
HOT = ("unify", "absorb", "merge", "decouple", "measure")
# Loads of at least one 16-byte vector in each kernel that reads models or unified deltas.
VECTOR_LOAD = re.compile(r"\bLDG\.E\.(?:\w+\.)*128")


def compiled(name: str) -> Path:
    """The newest object of csrc/cuda/``name``.cu, no older than its source."""
    source = ROOT / "csrc" / "cuda" / f"{name}.cu"
    found = [
        path
        for path in ROOT.glob(f"build/kernels-*/cuda_{name}.o")
        if path.stat().st_mtime >= source.stat().st_mtime
    ]
    if not found:
        pytest.skip(f"csrc/cuda/{name}.cu was not compiled here")
    return max(found, key=lambda path: path.stat().st_mtime)


def cuobjdump() -> str:
    """The toolkit's, or the one in triton's wheel, which torch brings along."""
    if found := shutil.which("cuobjdump"):
        return found
    triton = importlib.util.find_spec("triton")
    if triton is not None and triton.origin is not None:
        tool = Path(triton.origin).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
        if tool.is_file():
            return str(tool)
    pytest.skip("no cuobjdump: neither a CUDA toolkit that has it nor triton")


@pytest.mark.parametrize("name", [*HOT, "launch"])
def test_no_kernel_spills_registers(name: str) -> None:
    log = Path(f"{compiled(name)}.log").read_text()
    kernel, spilling, seen = "", [], 0
    for line in log.splitlines():
        if entry := re.search(r"Compiling entry function '(\w+)' for '(\w+)'", line):
            kernel = f"{entry[1]} on {entry[2]}"
        if spills := re.search(r"(\d+) bytes spill stores, (\d+) bytes spill loads", line):
            seen += 1
            if spills.groups() != ("0", "0"):
                spilling.append(f"{kernel}: {line.strip()}")
    assert seen
    assert not spilling, "\n".join(spilling)


@pytest.mark.parametrize("name", HOT)
def test_kernels_load_sixteen_bytes_at_once(name: str) -> None:
    """On every architecture, and at least one such load for each stream that is read."""
    sass = subprocess.run(
        [cuobjdump(), "-sass", str(compiled(name))], capture_output=True, text=True
    )
    if "nvdisasm" in sass.stderr:
        pytest.skip("cuobjdump finds no nvdisasm")
    assert sass.returncode == 0, sass.stderr
    kernels = re.split(r"Function : ", sass.stdout)[1:]
    assert kernels
    for kernel in kernels:
        label = kernel.split(maxsplit=1)[0]
        assert VECTOR_LOAD.search(kernel), f"{label} has no 16-byte load"
