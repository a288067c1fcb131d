"""Several runs side by side in the terminal."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from rich.table import Table

from condu.report.comparing import measured_rows, protocols_of
from condu.report.experiment import METRICS, Experiment
from condu.report.gathering import differences
from condu.report.spread import Spread
from condu.report.tables import NARROW, UNDEFINED, percent
from condu.terminal import printable


def comparison_tables(experiments: Sequence[Experiment]) -> list[Table]:
    """One table a protocol, one line a method of each experiment, in percent: the mean over the
    seeds, below it the least and the greatest."""
    return [_table(experiments, protocol) for protocol in protocols_of(experiments)]


def legend(experiments: Sequence[Experiment]) -> Iterator[str]:
    """Which runs an experiment is made of, and in which keys several experiments differ."""
    for experiment in experiments:
        runs = ", ".join(f"{run.folder} (seed {run.seed})" for run in experiment.runs)
        yield printable(f"{experiment.label}: {runs}" if experiment.label else runs)
    for key, values in differences(experiments).items():
        pairs = zip(experiments, values, strict=True)
        yield printable(f"{key}: " + "; ".join(f"{e.label} {value}" for e, value in pairs))


def _table(experiments: Sequence[Experiment], protocol: str) -> Table:
    table = Table(
        title=f"{experiments[0].first['benchmark']}, {protocol}",
        caption="percent; mean over the seeds, least–greatest below",
        **NARROW,
    )
    table.add_column("method", no_wrap=True)
    for metric in METRICS:
        name = metric.upper() if metric == "bwt" else metric.capitalize()
        table.add_column(name, justify="right", no_wrap=True)
    for row in measured_rows(experiments, protocol):
        table.add_row(row.title, *(_cell(row.metrics[metric]) for metric in METRICS))
    return table


def _cell(spread: Spread | None) -> str:
    if spread is None:
        return UNDEFINED
    return percent(spread.mean) + (f"\n[dim]{spread.range(percent)}" if spread.varies else "")
