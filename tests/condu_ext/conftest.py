"""Settings of the tensor-level tests: one thread, reproducible examples, GPU tests only on GPUs."""

from __future__ import annotations

from collections.abc import Iterator
from types import ModuleType
from typing import Any

import pytest
import torch
from emulated_cuda import compile_kernels, use
from hypothesis import settings

settings.register_profile("condu", deadline=None, derandomize=True, database=None)
settings.load_profile("condu")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="needs an NVIDIA GPU: torch.cuda.is_available() is False")
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(skip)


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def poisoned() -> Iterator[None]:
    """Memory that torch.empty returns is NaN or 255: whoever forgets to write it is seen."""
    torch.use_deterministic_algorithms(True)
    assert torch.utils.deterministic.fill_uninitialized_memory
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(scope="session")
def emulator(tmp_path_factory: pytest.TempPathFactory) -> ModuleType:
    """The CUDA kernels compiled for the CPU, once for all tests."""
    return compile_kernels(tmp_path_factory.mktemp("cuda_on_cpu"))


@pytest.fixture
def emulated(emulator: ModuleType, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """The operators of condu_ext._cuda on CPU tensors."""
    yield use(emulator, monkeypatch)
    emulator.reverse(False)
