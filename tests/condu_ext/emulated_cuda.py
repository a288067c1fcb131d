"""The CUDA kernels compiled as C++ and run on the CPU, behind the code of condu_ext._cuda.

``cuda_on_cpu/`` holds what they need of CUDA and the emulator. Everything from the operators'
arguments to the last kernel is the code that runs on a GPU; only the copy of tables to the device,
streams and the hardware are replaced.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from condu_ext import _alignment_cuda, _cuda, _tables

ROOT = Path(__file__).resolve().parents[2]
HERE = Path(__file__).resolve().parent / "cuda_on_cpu"
FLAGS = [
    *("-std=c++17", "-O1", "-fPIC", "-fvisibility=hidden"),
    "-ffp-contract=off",
    "-Wall",
    *("-Wno-unknown-pragmas", "-Wno-maybe-uninitialized"),
]


def compile_kernels(folder: Path, sources: Path = ROOT / "csrc") -> ModuleType:
    """Compile ``sources``/cuda as C++ into a Python module; skips without a compiler."""
    compiler = os.environ.get("CXX", "g++")
    if not shutil.which(compiler):
        pytest.skip(f"no C++ compiler: {compiler}")
    # torch brings pybind11's headers; without build isolation nobody else needs to.
    system = (Path(torch.__file__).parent / "include", sysconfig.get_paths()["include"])
    includes = [f"-I{HERE}", f"-I{sources}", *(f"-isystem{path}" for path in system)]

    def compile_one(source: Path) -> Path:
        target = folder / f"{source.stem}.o"
        command = [compiler, *FLAGS, *includes, "-x", "c++", "-c", str(source), "-o", str(target)]
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return target

    files = [
        *sorted((sources / "cuda").glob("*.cu")),
        sources / "bindings_cuda.cpp",
        HERE / "emulator.cpp",
    ]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        objects = list(pool.map(compile_one, files))
    library = folder / f"cuda_on_cpu{sysconfig.get_config_var('EXT_SUFFIX')}"
    subprocess.run([compiler, "-shared", *map(str, objects), "-o", str(library)], check=True)
    spec = importlib.util.spec_from_file_location("cuda_on_cpu", library)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def upload(packed: Any, device: torch.device) -> tuple[Tensor, None]:
    return torch.from_numpy(packed.copy()), None


def use(module: ModuleType, patch: pytest.MonkeyPatch) -> Any:
    """condu_ext._cuda on CPU tensors, its kernels emulated."""
    patch.setattr(_tables, "_C", module)
    patch.setattr(_cuda, "_C", module)
    patch.setattr(_alignment_cuda, "_C", module)
    patch.setattr(_tables, "upload", upload)
    patch.setattr(_tables, "is_capturing", lambda device: False)
    patch.setattr(_tables, "TABLES", _tables.TableCache())
    patch.setattr(_cuda, "_stream", lambda device: 0)
    return _cuda
