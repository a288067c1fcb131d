"""Every operation beside a copy of memory and pure PyTorch, as in `condu bench`, and under
pytest-benchmark, so that runs can be saved and compared with its options.
"""

from __future__ import annotations

import pytest
from pytest_benchmark.fixture import BenchmarkFixture

from condu.bench.cases import Case
from condu.bench.suite import MEASURED, WRONG, CaseResult, Suite

SLACK = 8 << 20  # the allocator's and the interpreter's own, whatever the model's size


def test_operation(
    case: Case, suite: Suite, results: list[CaseResult], benchmark: BenchmarkFixture
) -> None:
    result = suite.measure(case)
    results.append(result)
    assert result.status != WRONG, result.reason
    if result.status != MEASURED:
        pytest.skip(f"{result.status}: {result.reason}")
    if result.peak_extra_bytes is not None:
        assert result.peak_extra_bytes <= 1.01 * case.result_bytes + SLACK

    operation = suite.operation(case)
    benchmark.group = f"{case.model} {case.precision}"
    benchmark.extra_info["share of the copy's rate"] = result.ratio
    benchmark.pedantic(
        operation.run,
        setup=lambda: ((operation.prepare(),), {}),
        rounds=suite.settings.repeats,
        warmup_rounds=1,
    )
