"""Cases from the options of `condu bench`, one suite for all tests, and the table at the end."""

from __future__ import annotations

from pathlib import Path

import pytest

from condu.bench.command import Options, write
from condu.bench.record import record_of
from condu.bench.suite import CaseResult, Suite
from condu.bench.table import lines_of

OPTIONS = ("ops", "models", "tasks", "dtypes", "device", "baselines")
_SUITE = pytest.StashKey[Suite]()
_RESULTS = pytest.StashKey[list[CaseResult]]()


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("condu", "what is measured, as in `condu bench`")
    for name in OPTIONS:
        group.addoption(f"--{name}")
    group.addoption("--results", help="folder to write the record, its table and picture to")


def pytest_configure(config: pytest.Config) -> None:
    config.stash[_RESULTS] = []


def _options(config: pytest.Config) -> Options:
    given = {name: config.getoption(f"--{name}") for name in OPTIONS}
    return Options(**{name: value for name, value in given.items() if value is not None})


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "case" in metafunc.fixturenames:
        metafunc.parametrize("case", _options(metafunc.config).cases(), ids=str)


@pytest.fixture(scope="session")
def suite(pytestconfig: pytest.Config) -> Suite:
    made = Suite(_options(pytestconfig).settings(), print)
    pytestconfig.stash[_SUITE] = made
    return made


@pytest.fixture(scope="session")
def results(pytestconfig: pytest.Config) -> list[CaseResult]:
    return pytestconfig.stash[_RESULTS]


def pytest_terminal_summary(
    terminalreporter: pytest.TerminalReporter, config: pytest.Config
) -> None:
    suite, results = config.stash.get(_SUITE, None), config.stash[_RESULTS]
    if suite is None or not results:
        return
    record = record_of(suite.settings, suite.copy, results)
    for line in ["", *lines_of(record)]:
        terminalreporter.write_line(line)
    if folder := config.getoption("--results"):
        for line in write(record, Path(folder)):
            terminalreporter.write_line(line)
