"""Which runs belong together, and what sets the others apart."""

from __future__ import annotations

import string
from collections.abc import Sequence
from itertools import product
from pathlib import Path
from typing import Any

from condu.report.experiment import Experiment, Run
from condu.runfolder import RunFolder


class ReportError(ValueError):
    """Runs that cannot stand in one report; the message names them and what is in the way."""


def gather(folders: Sequence[Path]) -> list[Experiment]:
    """Read finished runs and put those that differ in nothing but the seed together.

    Experiments come in the order of their first folder, runs in that of their seeds. Raises
    `ReportError` for runs over other tasks, other classes of a task or another benchmark than the
    first, and for two of the same configuration and seed; `RunFolderError` for a folder without
    results.
    """
    runs = [Run(folder, RunFolder(folder).load_results()) for folder in folders]
    groups: list[list[Run]] = []
    for run in runs:
        _same_tasks(runs[0], run)
        group = next((group for group in groups if group[0].settings == run.settings), None)
        if group is None:
            groups.append([run])
            continue
        for other in group:
            if other.seed == run.seed:
                raise ReportError(
                    f"{other.folder} and {run.folder} have the same configuration and the same "
                    f"seed, {run.seed}: they are one measurement, give one of them"
                )
        group.append(run)
    labels = _labels(len(groups))
    return [
        Experiment(label, tuple(sorted(group, key=lambda run: run.seed)))
        for label, group in zip(labels, groups, strict=True)
    ]


def differences(experiments: Sequence[Experiment]) -> dict[str, list[Any]]:
    """The keys of the configuration in which experiments differ, each with every one's value; None
    where one has no such key."""
    settings = [experiment.runs[0].settings for experiment in experiments]
    values = {
        key: [each.get(key) for each in settings]
        for key in dict.fromkeys(key for each in settings for key in each)
    }
    return {key: each for key, each in values.items() if any(value != each[0] for value in each)}


def _same_tasks(first: Run, run: Run) -> None:
    for key in ("benchmark", "tasks"):
        ours, theirs = first.results[key], run.results[key]
        if ours != theirs:
            raise ReportError(
                f"one report is over the same tasks: {first.folder} has {key} {_text(ours)}, "
                f"{run.folder} has {_text(theirs)}"
            )
    for task in first.results["tasks"]:
        ours, theirs = (each.results["classes"].get(task, []) for each in (first, run))
        if ours != theirs:
            raise ReportError(
                f"one report is over the same tasks: task {task!r} has the classes {_text(ours)} "
                f"in {first.folder}, {_text(theirs)} in {run.folder}"
            )


def _text(value: str | list[str]) -> str:
    return value if isinstance(value, str) else ", ".join(value)


def _labels(count: int) -> list[str]:
    """A, B, … Z, AA, AB, …; a single experiment needs none."""
    if count == 1:
        return [""]
    labels: list[str] = []
    length = 1
    while len(labels) < count:
        labels += ["".join(letters) for letters in product(string.ascii_uppercase, repeat=length)]
        length += 1
    return labels[:count]
