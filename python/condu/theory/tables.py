"""What `condu theory` found, as tables for the terminal."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from rich.table import Table

from condu.report.tables import NARROW
from condu.theory.study import NUMBERS

FEW = 10
"""Tasks up to which each has a row; of more, some have."""


def tables(record: Mapping[str, Any]) -> Iterator[Table]:
    """One of Theorem F.3, and one of Theorem F.5 and Corollary F.6 for each kind of deltas."""
    yield _repetition_table(record)
    for name, found in record["deltas"].items():
        yield _joining_table(name, found)


def _repetition_table(record: Mapping[str, Any]) -> Table:
    table = Table(
        title="Theorem F.3: decouple and unify the same deltas again and again",
        caption="+: stopped before a change was below float32's resolution; change: of the deltas'"
        " L1 norm; order changes: of two λ; meet: pairs of masks; λ: in the last iteration",
        **NARROW,
    )
    table.add_column("deltas", no_wrap=True)
    for column in (
        *("tasks", "itera-\ntions", "first\nchange", "last\nchange", "order\nchanges"),
        *("masks\nmeet", "least\nλ"),
    ):
        table.add_column(column, justify="right")
    for name, found in record["deltas"].items():
        for row in found["repetition"]:
            table.add_row(
                name,
                str(row["tasks"]),
                f"{row['iterations']}{'' if row['converged'] else '+'}",
                f"{row['changes'][0][1]:.1e}",
                f"{row['changes'][-1][1]:.1e}",
                str(sum(row["swaps"].values())),
                f"{row['meeting']}/{row['pairs']}",
                f"{min(row['rescalers_last']):.4f}",
            )
    return table


def _joining_table(name: str, found: Mapping[str, Any]) -> Table:
    power = found["decay"]
    falls = "" if power is None else f"; the last column goes as n^{power:.2f} over the second half"
    table = Table(
        title=f"Theorem F.5, Corollary F.6: task n joins, {name} deltas",
        caption=f"percent; elected sign, winner, won by n: of the elements moved before{falls}",
        **NARROW,
    )
    columns = ("n", "mask\nbits", "elected\nsign", "winner", "won by n", "L1 change of\nold deltas")
    for column in columns:
        table.add_column(column, justify="right")
    last = found["joining"][-1]["tasks"]
    shown = (*NUMBERS, last) if last > FEW else range(last + 1)
    for row in found["joining"]:
        if row["tasks"] in shown:
            keys = ("mask_flips", "sign_flips", "winner_changes", "won_by_new", "delta_change")
            table.add_row(str(row["tasks"]), *(f"{100 * row[key]:.3f}" for key in keys))
    return table
