"""What the package says of itself, and that it needs no GPU to say it."""

from __future__ import annotations

import importlib.metadata
import os
import subprocess
import sys

import pytest
import torch

import condu_ext


def test_keys_and_values() -> None:
    info = condu_ext.build_info()
    assert list(info) == ["version", "cuda_archs", "cuda_devices", "cpu_isa", "openmp", "threads"]
    assert info["version"] == condu_ext.__version__ == importlib.metadata.version("condu")
    assert isinstance(info["cuda_archs"], list)
    assert all(arch.rstrip("af").isdigit() for arch in info["cuda_archs"])
    assert info["cuda_devices"] in range(1025)
    assert info["cpu_isa"] in ("avx512", "avx2", "baseline")
    assert info["openmp"] is True
    assert info["threads"] == torch.get_num_threads()


def test_threads_follow_torch() -> None:
    torch.set_num_threads(3)
    assert condu_ext.build_info()["threads"] == 3


def test_devices_are_those_that_torch_sees() -> None:
    if not condu_ext.build_info()["cuda_archs"] or not torch.version.cuda:
        pytest.skip("built without CUDA")
    assert condu_ext.build_info()["cuda_devices"] == torch.cuda.device_count()


def test_without_a_gpu() -> None:
    """Hidden or absent, a GPU is not needed to import, to ask, and to fuse on the CPU."""
    code = """
import condu_ext, torch
assert condu_ext.build_info()["cuda_devices"] == 0
state = condu_ext.unify({"a": {"w": torch.ones(3)}}, None)
assert state.rescaler("a") == 1.0
assert not torch.cuda.is_initialized()
"""
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr


def test_public_names() -> None:
    for name in condu_ext.__all__:
        assert getattr(condu_ext, name).__doc__, name


def test_no_upward_imports() -> None:
    """The tensor level does not pull in the trainer's level, nor what that is made of."""
    code = """
import sys, condu_ext
from condu_ext import fusion, storage
heavy = {"condu", "open_clip", "peft", "transformers", "torchvision", "accelerate", "sklearn"}
print(sorted(heavy & set(sys.modules)))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "[]"
