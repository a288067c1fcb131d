"""What each section of the page shows, from the experiments that are compared."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from condu.checkpoint.costs import size_text
from condu.report.comparing import (
    MeasuredRow,
    evaluated,
    measured_rows,
    other_models,
    protocols_of,
    published_for,
)
from condu.report.experiment import PHASES, Experiment, Fact
from condu.report.heatmaps import HeatMap, accuracy_matrix, vote_matrices
from condu.report.panels import BarPanel, LinePanel, Points, bar_panel, line_panel
from condu.report.published import PublishedTable
from condu.report.tables import percent

KEPT: dict[Fact, str] = {
    "rescaler": "rescaler λ",
    "density": "mask density",
    "relative_l2": "relative L2, ‖d̃ − d‖ / ‖d‖",
    "cosine": "cosine of d̃ and d",
}


MEMORIES: tuple[Literal["host", "device"], ...] = ("host", "device")


@dataclass(frozen=True)
class ProtocolPart:
    """Everything that was measured with one protocol, and the published tables to stand beside it,
    each with the models of these runs that are not its own."""

    name: str
    rows: list[MeasuredRow]
    published: list[tuple[PublishedTable, list[str]]]
    bars: list[BarPanel]
    matrices: list[HeatMap]
    curves: list[LinePanel]
    votes: list[HeatMap]


@dataclass(frozen=True)
class FusionPart:
    """What one method keeps of each task in its unified model, over the sessions."""

    title: str
    panels: list[LinePanel]


def protocol_parts(experiments: Sequence[Experiment]) -> list[ProtocolPart]:
    unified = frozenset(
        experiment.title(method)
        for experiment in experiments
        for method in experiment.methods
        if experiment.fused(method, "rescaler")
    )
    return [_protocol_part(experiments, name, unified) for name in protocols_of(experiments)]


def _protocol_part(
    experiments: Sequence[Experiment], protocol: str, unified: frozenset[str]
) -> ProtocolPart:
    pairs = evaluated(experiments, protocol)
    rows = measured_rows(experiments, protocol)
    bars = (
        bar_panel(
            f"{metric.capitalize()}, %",
            {row.title: row.metrics[metric] for row in rows},
            percent,
            greatest=100.0,
            marked=unified,
        )
        for metric in ("transfer", "average", "last")
    )
    curves = (
        line_panel(
            experiment.title(method),
            _accuracy_curves(experiment, method, protocol),
            _percent,
            tasks=experiment.tasks,
            high=100,
        )
        for experiment, method in pairs
    )
    # with the task given, every data set's first choice is its own task in the end
    voters = [] if protocol == "task-id" else pairs
    return ProtocolPart(
        name=protocol,
        rows=rows,
        published=[
            (table, other_models(experiments, table))
            for table in published_for(experiments, protocol)
        ],
        bars=[panel for panel in bars if panel],
        matrices=[accuracy_matrix(experiment, method, protocol) for experiment, method in pairs],
        curves=[panel for panel in curves if panel],
        votes=vote_matrices(voters, protocol),
    )


def fusion_parts(experiments: Sequence[Experiment]) -> list[FusionPart]:
    """Of the methods that keep a unified model."""
    return [
        _fusion_part(experiment, method)
        for experiment in experiments
        for method in experiment.methods
        if experiment.fused(method, "rescaler")
    ]


def _fusion_part(experiment: Experiment, method: str) -> FusionPart:
    tasks = experiment.tasks
    protocol = experiment.protocols(method)[0]
    joined = {
        task: [(session, spread) for session, spread in points if session >= tasks.index(task)]
        for task, points in _accuracy_curves(experiment, method, protocol).items()
    }
    kept = (
        line_panel(title, experiment.fused(method, fact), _digits, tasks=tasks, high=1)
        for fact, title in KEPT.items()
    )
    accuracy = line_panel(f"accuracy ({protocol}), %", joined, _percent, tasks=tasks, high=100)
    return FusionPart(experiment.title(method), [panel for panel in (*kept, accuracy) if panel])


def cost_panels(experiments: Sequence[Experiment]) -> list[BarPanel]:
    """Time and memory of every method."""
    pairs = [(e.title(method), e, method) for e in experiments for method in e.methods]
    seconds = (
        bar_panel(f"{phase}, s", {t: e.seconds(m, phase) for t, e, m in pairs}, _seconds)
        for phase in PHASES
    )
    peaks = (
        bar_panel(
            f"peak {where} memory, {phase}",
            {title: e.peak_bytes(method, phase, where) for title, e, method in pairs},
            size_text,
        )
        for where in MEMORIES
        for phase in PHASES
    )
    unified = bar_panel("unified model", {t: e.fused_bytes(m) for t, e, m in pairs}, size_text)
    return [panel for panel in (*seconds, *peaks, unified) if panel]


def misalignment_panel(experiments: Sequence[Experiment]) -> BarPanel | None:
    """Of the methods that merge adapters: how much of one had turned against the global one."""
    return bar_panel(
        "misaligned before merging, %",
        {e.title(method): e.misaligned(method) for e in experiments for method in e.methods},
        percent,
    )


def _accuracy_curves(experiment: Experiment, method: str, protocol: str) -> dict[str, Points]:
    """Of each task, its column of the accuracy matrix."""
    sessions = range(len(experiment.tasks))
    return {
        task: [(s, experiment.accuracy(method, protocol, s, column)) for s in sessions]
        for column, task in enumerate(experiment.tasks)
    }


def _seconds(value: float) -> str:
    return f"{value:.3g}" if value < 100 else f"{value:.0f}"


def _percent(value: float) -> str:
    return f"{percent(value)} %"


def _digits(value: float) -> str:
    return f"{value:.3f}"
