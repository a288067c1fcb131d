"""The map of features as marks in an SVG."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from condu.report.embedding import FeatureMap

SIZE = 560.0
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


def clouds(layout: FeatureMap, classes: Mapping[str, Sequence[str]]) -> list[Cloud]:
    """A cloud for each task, in their order; `classes` are its class names."""
    places = MARGIN + layout.places * (SIZE - 2 * MARGIN)
    found = []
    for position, (task, names) in enumerate(classes.items()):
        mine = layout.tasks == position
        images = mine & ~layout.prototype
        middle = np.median(places[images if images.any() else mine], axis=0)
        found.append(
            Cloud(
                task,
                position % HUES,
                SHAPES[position // HUES % len(SHAPES)],
                _marks(places[images], layout.classes[images], task, names, ""),
                _marks(
                    places[mine & layout.prototype],
                    layout.classes[mine & layout.prototype],
                    task,
                    names,
                    "prototype of ",
                ),
                (float(middle[0]), float(middle[1])),
            )
        )
    return found


def _marks(
    places: np.ndarray, classes: np.ndarray, task: str, names: Sequence[str], kind: str
) -> list[Mark]:
    return [
        Mark(float(x), float(y), f"{kind}{names[label]} ({task})")
        for (x, y), label in zip(places, classes, strict=True)
    ]
