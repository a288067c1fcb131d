"""The lines of the summary tables: what was measured, and beside it what was published."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from condu.report.experiment import METRICS, Experiment
from condu.report.published import CONFIGURED, TABLES, PublishedTable
from condu.report.spread import Spread
from condu.tasks.mtil import ORDERS


@dataclass(frozen=True)
class MeasuredRow:
    """One method of one experiment; `metrics` has every one of METRICS, None where it is not
    defined."""

    title: str
    metrics: dict[str, Spread | None]


def protocols_of(experiments: Sequence[Experiment]) -> list[str]:
    """The protocols that any method was evaluated with, in the order in which they first appear."""
    return list(
        dict.fromkeys(
            protocol
            for experiment in experiments
            for method in experiment.methods
            for protocol in experiment.protocols(method)
        )
    )


def evaluated(experiments: Sequence[Experiment], protocol: str) -> list[tuple[Experiment, str]]:
    """Every experiment with each of its methods that was evaluated with a protocol."""
    return [
        (experiment, method)
        for experiment in experiments
        for method in experiment.methods
        if protocol in experiment.protocols(method)
    ]


def measured_rows(experiments: Sequence[Experiment], protocol: str) -> list[MeasuredRow]:
    return [
        MeasuredRow(
            experiment.title(method),
            {metric: experiment.metric(method, protocol, metric) for metric in METRICS},
        )
        for experiment, method in evaluated(experiments, protocol)
    ]


def published_for(experiments: Sequence[Experiment], protocol: str) -> list[PublishedTable]:
    """Published tables of the benchmark, order, number of training images and protocol that these
    runs have; which of these may have another model, `other_models` says."""
    first = experiments[0].first
    shots = {
        experiment.first["configuration"]["benchmark"].get("shots") for experiment in experiments
    }
    return [
        table
        for table in TABLES
        if table.benchmark == first["benchmark"]
        and table.protocol == protocol
        and table.order is not None
        and ORDERS[table.order] == experiments[0].tasks
        and table.shots in shots
    ]


def other_models(experiments: Sequence[Experiment], table: PublishedTable) -> list[str]:
    """The models of these runs that are not, by name and tag, the one of a published table. Weights
    from a file may still be the same."""
    name, pretrained = CONFIGURED[table.model]
    others = (
        experiment.model
        for experiment in experiments
        for model in (experiment.first["configuration"]["model"],)
        if not (model["name"].startswith(name) and model["pretrained"] == pretrained)
    )
    return list(dict.fromkeys(others))


def published_elsewhere(experiments: Sequence[Experiment]) -> list[PublishedTable]:
    """The published tables that no table of these runs stands beside: for context."""
    beside = [
        table
        for protocol in protocols_of(experiments)
        for table in published_for(experiments, protocol)
    ]
    return [table for table in TABLES if table not in beside]
