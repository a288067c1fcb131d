"""The results of an ablation as a table for the terminal, and as one in Markdown: the default in
percent, the others as differences to it in percentage points."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from rich.table import Table

from condu.report.tables import NARROW, percent

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
    for title, protocol, _ in _columns(results):
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
    header = [f"{title} {SHORT[protocol]}" for title, protocol, _ in _columns(results)]
    lines = [
        "| | variant | " + " | ".join(header) + " |",
        "|---|---|" + "---:|" * len(header),
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


def _columns(results: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    """Those that were measured and are defined: title, protocol, metric."""
    protocols = results["rows"][0]["protocols"]
    return [column for column in COLUMNS if protocols[column[1]][column[2]] is not None]


def _lines(results: Mapping[str, Any]) -> Iterator[tuple[Mapping[str, Any], list[str]]]:
    columns = _columns(results)
    default, *others = (
        (row, [row["protocols"][protocol][metric] for _, protocol, metric in columns])
        for row in results["rows"]
    )
    yield default[0], [percent(value) for value in default[1]]
    for row, values in others:
        yield row, [_difference(*pair) for pair in zip(values, default[1], strict=True)]


def _difference(value: float, default: float) -> str:
    return f"{round(value - default, 1) + 0.0:+.1f}"  # + 0.0, for a -0.0 is no change either
