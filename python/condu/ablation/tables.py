"""The results of an ablation as a table for the terminal, and as one in Markdown: the default in
percent, the others as differences to it in percentage points."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from rich.table import Table

from condu.report.tables import NARROW, UNDEFINED, percent

COLUMNS = (
    ("Transfer", "task-id", "transfer"),
    ("Average", "task-id", "average"),
    ("Last", "task-id", "last"),
    ("Average", "agnostic", "average"),
    ("Last", "agnostic", "last"),
)
SHORT = {"task-id": "(id)", "agnostic": "(no id)"}


def table(results: Mapping[str, Any]) -> Table:
    """One line a variant, in groups."""
    count = len(results["tasks"])
    drawn = Table(
        title=f"{results['benchmark']}: {count} task{'s' * (count > 1)}, seed {results['seed']}",
        caption="default in percent, the others as differences to it; "
        "(id), (no id): with and without the task given",
        **NARROW,
    )
    drawn.add_column("variant", no_wrap=True)
    for title, protocol, _ in COLUMNS:
        drawn.add_column(f"{title}\n{SHORT[protocol]}", justify="right")
    group = None
    for row, cells in _lines(results):
        if row["group"] != group:
            group = row["group"]
            if group != "default":
                drawn.add_row()
                drawn.add_row(f"[bold]{group}")
        drawn.add_row(row["name"], *cells)
    return drawn


def markdown(results: Mapping[str, Any]) -> str:
    """The same in Markdown."""
    header = [f"{title} {SHORT[protocol]}" for title, protocol, _ in COLUMNS]
    lines = [
        "| | variant | " + " | ".join(header) + " |",
        "|---|---|" + "---:|" * len(COLUMNS),
    ]
    group = None
    for row, cells in _lines(results):
        label = "" if row["group"] == group else row["group"]
        group = row["group"]
        lines.append(f"| {label} | {row['name']} | " + " | ".join(cells) + " |")
    return "\n".join([*lines, "", ties(results), ""])


def ties(results: Mapping[str, Any]) -> str:
    """How many sums were exactly zero, in the checkpoints' own precision and in 16 bits."""
    default = results["rows"][0]["ties"]
    if default is None:
        return "exact ties: none with a single task"
    half = next(row["ties"] for row in results["rows"] if row["settings"]["half"])
    return (
        f"exact ties among the parameters that a new task moves: {100 * default:.4f} % as "
        f"fine-tuned, {100 * half:.2f} % as 16-bit checkpoints"
    )


def _lines(results: Mapping[str, Any]) -> Iterator[tuple[Mapping[str, Any], list[str]]]:
    default, *others = results["rows"]
    yield default, [percent(default["protocols"][p][metric]) for _, p, metric in COLUMNS]
    for row in others:
        yield (
            row,
            [
                _difference(row["protocols"][p][metric], default["protocols"][p][metric])
                for _, p, metric in COLUMNS
            ],
        )


def _difference(value: float | None, default: float | None) -> str:
    if value is None or default is None:
        return UNDEFINED
    return f"{value - default:+.1f}"
