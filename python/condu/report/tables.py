"""The results of a run as tables for the terminal. Numbers are rounded here and nowhere else."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich import box
from rich.markup import escape
from rich.table import Table

UNDEFINED = "–"
NARROW: dict[str, Any] = {"box": box.SIMPLE_HEAD, "collapse_padding": True, "pad_edge": False}
"""No vertical lines, so that seven tasks fit into 80 columns."""


def misalignment(results: Mapping[str, Any]) -> str | None:
    """Of the methods that merge adapters: how much of an adapter had the opposite sign of the
    global one just before it was merged, as the mean over tasks. None if there is no such method.
    """
    shares = {
        name: [s["misaligned"] for s in method["sessions"] if s["misaligned"] is not None]
        for name, method in results["methods"].items()
    }
    means = [
        f"{name} {percent(100 * sum(found) / len(found))} %"
        for name, found in shares.items()
        if found
    ]
    if not means:
        return None
    return f"weights misaligned with the global adapter before merging: {', '.join(means)}"


def summary_table(results: Mapping[str, Any]) -> Table:
    """One line a method: Transfer, Average, Last (which is ACC too) and BWT with the task known,
    Average and Last without, and the time spent training and fusing. Accuracies in percent."""
    tasks = len(results["tasks"])
    table = Table(
        title=f"{results['benchmark']}: {tasks} task{'s' * (tasks > 1)}, seed {results['seed']}",
        caption="percent; (id), (no id): with and without the task given; Last is ACC",
        **NARROW,
    )
    table.add_column("method", no_wrap=True)
    for column in (
        "Transfer\n(id)",
        "Average\n(id)",
        "Last\n(id)",
        "BWT\n(id)",
        "Average\n(no id)",
        "Last\n(no id)",
        "train\ns",
        "fuse\nms",
    ):
        table.add_column(column, justify="right")
    for name, method in results["methods"].items():
        protocols = method["protocols"]
        known, unknown = protocols.get("task-id", {}), protocols.get("agnostic", {})
        table.add_row(
            name,
            *(percent(known.get(metric)) for metric in ("transfer", "average", "last", "bwt")),
            *(percent(unknown.get(metric)) for metric in ("average", "last")),
            f"{method['seconds']['train']:.1f}",
            f"{1000 * method['seconds']['fuse']:.0f}",
        )
    return table


def matrix_table(results: Mapping[str, Any], method: str, protocol: str) -> Table:
    """Accuracy on every dataset (columns) after each task (rows); what was not yet trained on is
    dim."""
    tasks = results["tasks"]
    table = Table(title=f"{method}, {protocol} (%)", **NARROW)
    table.add_column("after learning")
    for task in tasks:
        table.add_column(escape(task), justify="right")
    for i, row in enumerate(results["methods"][method]["protocols"][protocol]["matrix"]):
        cells = [percent(value) for value in row]
        unseen = [f"[dim]{cell}" for cell in cells[i + 1 :]]
        table.add_row(escape(tasks[i]), *cells[: i + 1], *unseen)
    return table


def percent(value: float | None) -> str:
    """A percentage with one decimal; a dash for what was not measured or is not defined."""
    if value is None:
        return UNDEFINED
    return f"{round(value, 1) + 0.0:.1f}"  # the sum turns a zero below zero round
