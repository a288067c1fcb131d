"""Finished runs as they are compared: those that differ in nothing but the seed are one experiment.

What a run records is described in `condu.runfolder`; here it is read as spreads over the seeds.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from condu.config import WITHOUT_EFFECT, leaves
from condu.report.spread import Spread

METRICS = ("transfer", "average", "last", "bwt", "forgetting")
Phase = Literal["train", "fuse", "evaluate"]
PHASES: tuple[Phase, ...] = ("train", "fuse", "evaluate")
Fact = Literal["rescaler", "density", "relative_l2", "cosine"]


@dataclass(frozen=True)
class Run:
    """One finished run."""

    folder: Path
    results: Mapping[str, Any]

    @property
    def name(self) -> str:
        """Of the folder, also if that was given as `.`."""
        return self.folder.resolve().name

    @property
    def seed(self) -> int:
        return int(self.results["seed"])

    @property
    def settings(self) -> dict[str, Any]:
        """Every key of the configuration that its numbers depend on, but for the seed. Folders of
        images are whatever their root holds, so of those the root is one."""
        values = dict(leaves(self.results["configuration"]))
        ignored = {*WITHOUT_EFFECT, "seed"}
        if values["benchmark.name"] == "folders":
            ignored.remove("benchmark.root")
            values["benchmark.root"] = os.path.normpath(values["benchmark.root"])
        return {key: value for key, value in values.items() if key not in ignored}


@dataclass(frozen=True)
class Experiment:
    """Runs of one configuration, by seed. `label` tells several experiments of a report apart and
    is empty where there is but one."""

    label: str
    runs: tuple[Run, ...]

    @property
    def first(self) -> Mapping[str, Any]:
        """The results of the first seed; what does not depend on the seed is read from these."""
        return self.runs[0].results

    @property
    def seeds(self) -> tuple[int, ...]:
        return tuple(run.seed for run in self.runs)

    @property
    def tasks(self) -> tuple[str, ...]:
        return tuple(self.first["tasks"])

    @property
    def methods(self) -> tuple[str, ...]:
        return tuple(self.first["methods"])

    @property
    def images(self) -> Mapping[str, Mapping[str, int]]:
        """How many images each task had to `train` and to `test`, of the first seed that says so;
        empty where none does, for older runs did not."""
        known = (run.results.get("images") for run in self.runs)
        return next((images for images in known if images), {})

    @property
    def model(self) -> str:
        """As the configuration calls it."""
        model = self.first["configuration"]["model"]
        return (
            f"{model['name']} ({model['pretrained']})" if model.get("pretrained") else model["name"]
        )

    def title(self, method: str) -> str:
        """A method's name in this report."""
        return f"{method} · {self.label}" if self.label else method

    def protocols(self, method: str) -> tuple[str, ...]:
        return tuple(self.first["methods"][method]["protocols"])

    def metric(self, method: str, protocol: str, metric: str) -> Spread | None:
        return self._over(method, lambda found: found["protocols"][protocol][metric])

    def accuracy(self, method: str, protocol: str, session: int, task: int) -> Spread:
        """Percent on a task (a column of the accuracy matrix) after a session (a row)."""
        cell = self._over(
            method, lambda found: found["protocols"][protocol]["matrix"][session][task]
        )
        assert cell is not None  # a matrix has no gaps
        return cell

    def votes(self, method: str, protocol: str) -> list[list[float]] | None:
        """Percent of the images of each data set (rows) whose first choice was each task (columns)
        in the end, as the mean over the seeds. None of a method that does not vote."""
        found = [run.results["methods"][method]["protocols"][protocol] for run in self.runs]
        if found[0].get("votes") is None:
            return None
        shares = np.mean([_shares(table["votes"][-1]) for table in found], axis=0)
        rows: list[list[float]] = shares.tolist()
        return rows

    def seconds(self, method: str, phase: Phase) -> Spread | None:
        return self._over(method, lambda found: found["seconds"][phase])

    def peak_bytes(
        self, method: str, phase: Phase, where: Literal["host", "device"]
    ) -> Spread | None:
        """The most memory that the process held in that phase of any session of the method."""

        def peak(found: Mapping[str, Any]) -> int | None:
            sessions = [session["peak_bytes"][phase] for session in found["sessions"]]
            held = [session[where] for session in sessions if session is not None]
            return max((size for size in held if size is not None), default=None)

        return self._over(method, peak)

    def misaligned(self, method: str) -> Spread | None:
        """Percent of an adapter's weights that had turned against the global one just before they
        were merged, as the mean over the sessions that merged."""

        def mean(found: Mapping[str, Any]) -> float | None:
            shares = [session["misaligned"] for session in found["sessions"]]
            merged = [share for share in shares if share is not None]
            return 100 * sum(merged) / len(merged) if merged else None

        return self._over(method, mean)

    def fused_bytes(self, method: str) -> Spread | None:
        """Bytes of the unified state in the end."""
        return self._over(method, lambda found: (found["sessions"][-1]["fused"] or {}).get("bytes"))

    def fused(self, method: str, fact: Fact) -> dict[str, list[tuple[int, Spread]]]:
        """What is known of each task in the unified model, by session; empty of a method that keeps
        no unified model."""
        found: dict[str, list[tuple[int, Spread]]] = {}
        for task in self.tasks:
            points = []
            for session in range(len(self.tasks)):
                sessions = (run.results["methods"][method]["sessions"] for run in self.runs)
                spread = Spread.of(_facts(each[session], task).get(fact) for each in sessions)
                if spread is not None:
                    points.append((session, spread))
            if points:
                found[task] = points
        return found

    def _over(
        self, method: str, read: Callable[[Mapping[str, Any]], float | None]
    ) -> Spread | None:
        return Spread.of(read(run.results["methods"][method]) for run in self.runs)


def _shares(votes: Sequence[Sequence[int]]) -> np.ndarray:
    counts = np.asarray(votes, dtype=float)
    return 100 * counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)


def _facts(session: Mapping[str, Any], task: str) -> Mapping[str, float]:
    """What a session found of a task; nothing before the task joined, or without fusion."""
    tasks: Mapping[str, Mapping[str, float]] = (session["fused"] or {}).get("tasks", {})
    return tasks.get(task, {})
