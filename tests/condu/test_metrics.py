from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch

from condu.metrics import Summary, summarize

ORDER_I = [24.3, 88.4, 68.2, 44.6, 54.9, 71.0, 88.5, 59.4, 89.0, 64.7, 65.2]
# Cars, Food, MNIST, OxfordPet, Flowers, SUN397, Aircraft, Caltech101, DTD, EuroSAT, CIFAR100
ORDER_II = [64.7, 88.5, 59.4, 89.0, 71.0, 65.2, 24.3, 88.4, 44.6, 54.9, 68.2]


@pytest.mark.parametrize(("row", "transfer"), [(ORDER_I, 69.39), (ORDER_II, 65.35)])
def test_published_zero_shot_rows(row: list[float], transfer: float) -> None:
    summary = summarize([row] * len(row))
    assert abs(summary.transfer - transfer) < 0.005
    assert abs(summary.average - 65.29) < 0.005
    assert summary.average == pytest.approx(summary.last, abs=1e-12)
    assert summary.bwt == 0
    assert summary.forgetting == 0


def test_three_tasks_by_hand() -> None:
    summary = summarize([[90, 30, 20], [60, 80, 40], [70, 50, 100]])
    assert summary == Summary(
        transfer=(30 + (20 + 40) / 2) / 2,
        average=540 / 9,
        last=220 / 3,
        acc=220 / 3,
        bwt=((70 - 90) + (50 - 80)) / 2,
        forgetting=((90 - 70) + (80 - 50)) / 2,
    )


def test_forgetting_is_from_the_best_since_learning_and_bwt_from_the_diagonal() -> None:
    # dataset 0 was best after task 1; dataset 1 before it was learned, which does not count
    summary = summarize([[50, 99, 0], [60, 10, 0], [55, 10, 0]])
    assert summary.forgetting == ((60 - 55) + (10 - 10)) / 2
    assert summary.bwt == ((55 - 50) + (10 - 10)) / 2


def test_forgetting_is_negative_where_a_task_ends_better_than_ever() -> None:
    assert summarize([[50, 0], [75, 0]]).forgetting == -25


def test_true_zero_counts() -> None:
    summary = summarize([[100, 0], [0, 100]])
    assert summary.transfer == 0
    assert summary.average == 50
    assert summary.last == 50


def test_one_task_has_nothing_to_transfer_or_forget() -> None:
    summary = summarize([[42.0]])
    assert (summary.average, summary.last, summary.acc) == (42.0, 42.0, 42.0)
    assert all(math.isnan(v) for v in (summary.transfer, summary.bwt, summary.forgetting))


@pytest.mark.parametrize("kind", [np.array, torch.tensor, tuple])
def test_arrays(kind: Any) -> None:
    rows = [[10.0, 20.0], [30.0, 40.0]]
    assert summarize(kind(rows)) == summarize(rows)


@pytest.mark.parametrize(
    ("matrix", "message"),
    [
        ([], "empty"),
        ([[1.0, 2.0]], "1 rows, row 0 has 2"),
        ([[1.0, 2.0], [3.0]], "2 rows, row 1 has 1"),
        ([[1.0, 2.0], [3.0, math.nan]], r"\[1\]\[1\].*nan"),
        ([[1.0, 100.5], [3.0, 4.0]], r"\[0\]\[1\].*100\.5"),
        ([[1.0, 2.0], [-0.1, 4.0]], r"\[1\]\[0\].*-0\.1"),
        ([[1.0, None], [3.0, 4.0]], r"\[0\]\[1\].*None"),
    ],
)
def test_bad_matrices(matrix: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        summarize(matrix)
