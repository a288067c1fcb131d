from __future__ import annotations

import pytest

from condu.metrics import summarize
from condu.report.published import (
    COIN,
    MTIL,
    MTIL_AGNOSTIC,
    MTIL_FIVE_SHOT,
    TABLES,
    ZERO_SHOT,
    PublishedTable,
)
from condu.tasks.mtil import ORDERS


@pytest.mark.parametrize(("order", "transfer"), [("I", 69.39), ("II", 65.35)])
def test_the_zero_shot_row_held_constant_gives_the_published_summary(
    order: str, transfer: float
) -> None:
    row = [ZERO_SHOT[name] for name in ORDERS[order]]
    summary = summarize([row] * len(row))
    assert summary.transfer == pytest.approx(transfer, abs=0.005)
    assert summary.average == pytest.approx(65.29, abs=0.005)
    assert summary.last == pytest.approx(65.29, abs=0.005)


def test_the_zero_shot_line_is_the_row_of_data_sets_rounded() -> None:
    summary = summarize([list(ZERO_SHOT.values())] * len(ZERO_SHOT))
    line = next(row for row in MTIL.rows if row.method == "Zero-shot")
    assert (line.transfer, line.average, line.last) == tuple(
        round(value, 1) for value in (summary.transfer, summary.average, summary.last)
    )


@pytest.mark.parametrize(
    ("table", "method", "values"),
    [
        (MTIL, "ConDU (FT)", (70.8, 78.8, 87.1)),
        (MTIL, "ConDU (LoRA)", (70.3, 78.3, 86.2)),
        (MTIL, "ZSCL", (68.1, 75.4, 83.6)),
        (MTIL, "DPeCLIP", (69.1, 77.5, 86.9)),
        (MTIL, "MulKI", (70.1, 77.3, 85.1)),
        (MTIL_AGNOSTIC, "ConDU (FT)", (None, 78.1, 86.4)),
        (MTIL_FIVE_SHOT, "ConDU (LoRA)", (70.3, 72.7, 77.4)),
    ],
)
def test_rows_of_the_papers(
    table: PublishedTable, method: str, values: tuple[float | None, ...]
) -> None:
    (row,) = (row for row in table.rows if row.method == method)
    assert (row.transfer, row.average, row.last) == values


def test_a_table_knows_which_metrics_it_has() -> None:
    assert MTIL.metrics == ("transfer", "average", "last")
    assert MTIL_AGNOSTIC.metrics == ("average", "last")
    assert COIN.metrics == ("acc", "bwt")


def test_every_row_has_a_number_and_every_method_one_row() -> None:
    for table in TABLES:
        assert len({row.method for row in table.rows}) == len(table.rows)
        for row in table.rows:
            values = [getattr(row, metric) for metric in table.metrics]
            assert any(value is not None for value in values), (table.title, row.method)
            assert all(-100 <= value <= 100 for value in values if value is not None)
