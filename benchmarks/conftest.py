"""One ViT-B/16 with eight fine-tuned models for all benchmarks, and the table at the end."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

from torch import Tensor

from models import finetuned_weights, pretrained_weights
from table import Table

TASKS = 8


@pytest.fixture(scope="session")
def pretrained() -> dict[str, Tensor]:
    return pretrained_weights("ViT-B-16")


@pytest.fixture(scope="session")
def finetuned(pretrained: dict[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    return {f"task {i}": finetuned_weights(pretrained, seed=i) for i in range(TASKS)}


@pytest.fixture(scope="session")
def table() -> Table:
    return _TABLE


_TABLE = Table()


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    for line in _TABLE.lines():
        terminalreporter.write_line(line)
    if path := terminalreporter.config.getoption("--results"):
        _TABLE.write(Path(path))


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--results", help="folder to write the table and its figures to")
