"""The data sets behind the numbers: their classes, how many images they have, what one is worth."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from condu.report.experiment import Experiment
from condu.report.tables import UNDEFINED

Split = Literal["train", "test"]


@dataclass(frozen=True)
class DataSet:
    """`train` and `test` are numbers of images in words."""

    task: str
    train: str
    test: str
    classes: Sequence[str]


def data_sets(experiments: Sequence[Experiment]) -> list[DataSet]:
    """One for each task with classes, so none where the tasks are questions."""
    return [
        DataSet(
            task,
            _count(experiments, task, "train"),
            _count(experiments, task, "test"),
            classes,
        )
        for task, classes in experiments[0].first["classes"].items()
    ]


def resolution(experiments: Sequence[Experiment]) -> str | None:
    """What one image of the smallest test set is worth; None if no run says how many it had, and
    where the tasks are questions."""
    sizes = [
        (count, task)
        for experiment in experiments
        for task in experiment.first["classes"]
        if (count := experiment.images.get(task, {}).get("test"))
    ]
    if not sizes:
        return None
    count, task = min(sizes, key=lambda size: size[0])  # of equal ones the first
    points = f"{100 / count:.1f}" if count <= 100 else f"{100 / count:.2g}"
    return (
        f"One test image of {task}, which has the fewest ({count}), is {points} points of its "
        "accuracy."
    )


def _count(experiments: Sequence[Experiment], task: str, split: Split) -> str:
    """One number, or where configurations differ that of each that knows it."""
    counts = {
        experiment.label: experiment.images.get(task, {}).get(split) for experiment in experiments
    }
    known = {label: count for label, count in counts.items() if count is not None}
    if len(known) == len(counts) and len(set(known.values())) == 1:
        return str(next(iter(known.values())))
    return ", ".join(f"{label} {count}".strip() for label, count in known.items()) or UNDEFINED
