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
LABELS = {"task-id": "id", "agnostic": "no id"}
"""Protocols that share a summary, and how they are told apart there."""
SUMMARY = {"transfer": "Transfer", "average": "Average", "last": "Last", "bwt": "BWT"}


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


def summary_tables(results: Mapping[str, Any]) -> list[Table]:
    """One line a method, accuracies in percent: one table with the task known and without, which
    share their Transfer and BWT, and one for each union of classes that the run was evaluated with.
    The first also has the seconds spent training and the milliseconds spent fusing."""
    methods = results["methods"].values()
    found = dict.fromkeys(protocol for method in methods for protocol in method["protocols"])
    given = [protocol for protocol in LABELS if protocol in found]
    unions = [[protocol] for protocol in found if protocol not in LABELS]
    groups = [group for group in (given, *unions) if group]
    return [_summary(results, group, costs=group is groups[0]) for group in groups]


def _summary(results: Mapping[str, Any], protocols: list[str], *, costs: bool) -> Table:
    """Of the first protocol all metrics, of the others Average and Last; the methods that were
    evaluated with any of them."""
    tasks = len(results["tasks"])
    run = f"{results['benchmark']}: {tasks} task{'s' * (tasks > 1)}, seed {results['seed']}"
    table = Table(
        title=f"{run}\nprotocol{'s' * (len(protocols) > 1)} {' and '.join(protocols)}",
        caption="; ".join(["percent", *_meaning(protocols), "Last is ACC"]),
        **NARROW,
    )
    columns = [
        (protocol, metric)
        for protocol in protocols
        for metric in (SUMMARY if protocol == protocols[0] else ("average", "last"))
    ]
    table.add_column("method", no_wrap=True)
    for protocol, metric in columns:
        label = LABELS.get(protocol)
        table.add_column(SUMMARY[metric] + (f"\n({label})" if label else ""), justify="right")
    for column in ("train\ns", "fuse\nms") if costs else ():
        table.add_column(column, justify="right")
    for name, method in results["methods"].items():
        measured = method["protocols"]
        if not any(protocol in measured for protocol in protocols):
            continue
        cells = [percent(measured.get(protocol, {}).get(metric)) for protocol, metric in columns]
        if costs:
            seconds = method["seconds"]
            cells += [f"{seconds['train']:.1f}", f"{1000 * seconds['fuse']:.0f}"]
        table.add_row(name, *cells)
    return table


def _meaning(protocols: list[str]) -> list[str]:
    words = {
        ("task-id", "agnostic"): "(id), (no id): with and without the task given",
        ("task-id",): "(id): with the task given",
        ("agnostic",): "(no id): without the task given",
    }.get(tuple(protocols))
    return [words] if words else []


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
