"""The map of features as marks in an SVG."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from condu.report.embedding import FeatureMap

WIDTH = 640.0
MARGIN = 22.0
HUES = 7
"""Colours that colour-blind readers can tell apart; a shape for each round of them."""
SHAPES = (
    "m-2.6 0a2.6 2.6 0 1 0 5.2 0a2.6 2.6 0 1 0-5.2 0",
    "m-2.4-2.4h4.8v4.8h-4.8z",
    "m0-3l2.9 5.2h-5.8z",
)
"""Circle, square and triangle, drawn from the middle."""


@dataclass(frozen=True)
class Mark:
    x: float
    y: float
    tip: str


@dataclass(frozen=True)
class Cloud:
    """One task: its images, its prototypes, and where its name stands."""

    task: str
    hue: int
    shape: str
    images: list[Mark]
    prototypes: list[Mark]
    label: tuple[float, float]


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
        _cloud(layout, places, position, task, names)
        for position, (task, names) in enumerate(classes.items())
    ]
    return Scatter(seed, WIDTH, float(places[:, 1].max()) + MARGIN, clouds)


def _cloud(
    layout: FeatureMap, places: np.ndarray, position: int, task: str, names: Sequence[str]
) -> Cloud:
    def marks(chosen: np.ndarray, kind: str) -> list[Mark]:
        return [
            Mark(float(x), float(y), f"{kind}{names[label]} ({task})")
            for (x, y), label in zip(places[chosen], layout.classes[chosen], strict=True)
        ]

    mine = layout.tasks == position
    images, prototypes = mine & ~layout.prototype, mine & layout.prototype
    middle = np.median(places[images if images.any() else prototypes], axis=0)
    return Cloud(
        task,
        position % HUES,
        SHAPES[position // HUES % len(SHAPES)],
        marks(images, ""),
        marks(prototypes, "prototype of "),
        (float(middle[0]), float(middle[1])),
    )
