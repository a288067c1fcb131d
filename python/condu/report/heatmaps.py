"""Square tables of percentages whose cells are coloured by their value."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from condu.report.experiment import Experiment
from condu.report.tables import percent

LEVELS = 51
"""Colours from 0 to 100 %; the page's style gives each its own."""


@dataclass(frozen=True)
class Cell:
    """`level` is the colour, from 0 to LEVELS - 1; `note` is what the tip adds to the value."""

    text: str
    level: int
    note: str = ""
    unseen: bool = False


@dataclass(frozen=True)
class HeatMap:
    """`tip` is a sentence with the places {value}, {row} and {column}."""

    title: str
    subtitle: str
    corner: str
    tip: str
    columns: Sequence[str]
    rows: list[tuple[str, list[Cell]]]


def accuracy_matrix(experiment: Experiment, method: str, protocol: str) -> HeatMap:
    """Accuracy on each data set (columns) after each session (rows), the mean over the seeds."""
    tasks = experiment.tasks
    rows = []
    for session, learnt in enumerate(tasks):
        cells = []
        for task in range(len(tasks)):
            spread = experiment.accuracy(method, protocol, session, task)
            notes = [f"({spread.range(percent)})"] * spread.varies
            unseen = task > session
            notes += ["not learnt yet"] * unseen
            cells.append(Cell(percent(spread.mean), _level(spread.mean), " ".join(notes), unseen))
        rows.append((learnt, cells))
    summary = (
        (name, experiment.metric(method, protocol, name))
        for name in ("transfer", "average", "last")
    )
    return HeatMap(
        title=experiment.title(method),
        subtitle=" · ".join(
            f"{name.capitalize()} {percent(spread.mean)}" for name, spread in summary if spread
        ),
        corner="after ↓ on →",
        tip="{value} % on {column} after learning {row}",
        columns=tasks,
        rows=rows,
    )


def vote_matrices(voters: Sequence[tuple[Experiment, str]], protocol: str) -> list[HeatMap]:
    """Which task (columns) was the first choice of the images of each data set (rows) in the end,
    of the methods that vote; one matrix for all of those whose votes are the same."""
    alike: list[tuple[list[list[float]], list[str]]] = []
    for experiment, method in voters:
        shares = experiment.votes(method, protocol)
        if shares is None:
            continue
        titles = next((titles for known, titles in alike if known == shares), None)
        if titles is None:
            alike.append((shares, titles := []))
        titles.append(experiment.title(method))
    return [_vote_matrix(voters[0][0].tasks, shares, titles) for shares, titles in alike]


def _vote_matrix(
    tasks: Sequence[str], shares: Sequence[Sequence[float]], titles: Sequence[str]
) -> HeatMap:
    return HeatMap(
        title=", ".join(titles),
        subtitle="first choice of a data set's images, %",
        corner="images of ↓ task →",
        tip="{value} % of the images of {row} are nearest to {column}",
        columns=tasks,
        rows=[
            (task, [Cell(percent(share), _level(share)) for share in row])
            for task, row in zip(tasks, shares, strict=True)
        ],
    )


def _level(value: float) -> int:
    return round(value / 100 * (LEVELS - 1))
