"""The map of features as marks in an SVG."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from condu.report.embedding import FeatureMap
from condu.report.panels import Dot
from condu.report.taskmarks import TaskMark, task_marks

WIDTH = 640.0
MARGIN = 22.0


@dataclass(frozen=True)
class Label:
    """A name that goes from (x, y) in the direction in which there is room: `anchor` is SVG's."""

    x: float
    y: float
    anchor: str


@dataclass(frozen=True)
class Cloud:
    """One task: its images, its prototypes, and where its name stands."""

    mark: TaskMark
    images: list[Dot]
    prototypes: list[Dot]
    label: Label


@dataclass(frozen=True)
class Scatter:
    """The map of the run with this seed."""

    seed: int
    width: float
    height: float
    clouds: list[Cloud]


def scatter(layout: FeatureMap, classes: Mapping[str, Sequence[str]], seed: int) -> Scatter:
    """A cloud for each task, in their order; `classes` are its class names."""
    places = MARGIN + layout.places * (WIDTH - 2 * MARGIN)
    clouds = [
        _cloud(layout, places, position, mark, classes[mark.task])
        for position, mark in enumerate(task_marks(list(classes)))
    ]
    return Scatter(seed, WIDTH, float(places[:, 1].max()) + MARGIN, clouds)


def _cloud(
    layout: FeatureMap, places: np.ndarray, position: int, mark: TaskMark, names: Sequence[str]
) -> Cloud:
    def dots(chosen: np.ndarray, kind: str) -> list[Dot]:
        return [
            Dot(float(x), float(y), f"{kind}{names[label]} ({mark.task})")
            for (x, y), label in zip(places[chosen], layout.classes[chosen], strict=True)
        ]

    mine = layout.tasks == position
    images, prototypes = mine & ~layout.prototype, mine & layout.prototype
    return Cloud(
        mark,
        dots(images, ""),
        dots(prototypes, "prototype of "),
        _label(places[images if images.any() else prototypes]),
    )


def _label(places: np.ndarray) -> Label:
    """At the medoid, the one of `places` [n, 2] whose distances to the others have the least sum:
    the middle of several groups may be where there is none of them."""
    distances = np.linalg.norm(places[:, None] - places[None], axis=-1)
    x, y = (float(value) for value in places[distances.sum(axis=1).argmin()])
    return Label(x, y, "start" if x < WIDTH / 4 else "end" if x > WIDTH * 3 / 4 else "middle")
