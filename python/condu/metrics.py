"""Continual-learning metrics of one accuracy matrix.

``A[i][j]`` is the accuracy in percent on dataset j after learning task i, both counted from 0 and
in training order; the entries above the diagonal are datasets that have not been trained on yet.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Summary:
    """Metrics in percent (``bwt`` and ``forgetting`` in percentage points), unrounded.

    With a single task there is no unseen dataset and nothing to forget: ``transfer``, ``bwt`` and
    ``forgetting`` are NaN.
    """

    transfer: float
    average: float
    last: float
    acc: float
    bwt: float
    forgetting: float


def summarize(matrix: Any) -> Summary:
    """Summarise a [T, T] accuracy matrix (nested sequences, array or tensor) in percent.

    - ``transfer``: mean over j >= 1 of the mean over i < j of A[i][j], zero-shot ability on
      datasets not yet trained on.
    - ``average``: mean over j of the mean over i of A[i][j].
    - ``last``: mean over j of A[T-1][j]; ``acc`` is the same number under the name that continual
      learning uses.
    - ``bwt``: mean over i < T-1 of A[T-1][i] - A[i][i]; negative when old tasks got worse.
    - ``forgetting``: mean over j < T-1 of max over i in j..T-2 of A[i][j], minus A[T-1][j]
      (Chaudhry et al. 2018, with the maximum taken from the session that learned j onwards).

    A true accuracy of 0 % counts like any other. Raises ValueError naming the row or the entry when
    the matrix is empty, not square, or holds something that is not a number from 0 to 100.
    """
    a = _checked(matrix)
    tasks = len(a)
    final = a[-1]
    last = _mean(final)
    return Summary(
        transfer=_mean([_mean([a[i][j] for i in range(j)]) for j in range(1, tasks)]),
        average=_mean([_mean([row[j] for row in a]) for j in range(tasks)]),
        last=last,
        acc=last,
        bwt=_mean([final[i] - a[i][i] for i in range(tasks - 1)]),
        forgetting=_mean(
            [max(a[i][j] for i in range(j, tasks - 1)) - final[j] for j in range(tasks - 1)]
        ),
    )


def _mean(values: Sequence[float]) -> float:
    # fsum: a constant matrix must give that constant back, whatever the number of tasks
    return math.fsum(values) / len(values) if values else math.nan


def _checked(matrix: Any) -> list[list[float]]:
    rows = [list(row) for row in matrix]
    if not rows:
        raise ValueError("accuracy matrix is empty")
    return [
        [_percent(entry, i, j) for j, entry in enumerate(_full(row, i, len(rows)))]
        for i, row in enumerate(rows)
    ]


def _full(row: list[Any], i: int, tasks: int) -> list[Any]:
    if len(row) != tasks:
        raise ValueError(
            f"accuracy matrix is not square: it has {tasks} rows, row {i} has {len(row)} entries"
        )
    return row


def _percent(entry: Any, i: int, j: int) -> float:
    try:
        value = float(entry)
    except (TypeError, ValueError):
        value = math.nan
    if not 0.0 <= value <= 100.0:
        raise ValueError(f"accuracy matrix entry [{i}][{j}] must be from 0 to 100, got {entry!r}")
    return value
