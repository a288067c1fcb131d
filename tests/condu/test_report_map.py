"""How tasks are marked, and where their names stand on the map of features."""

from __future__ import annotations

import numpy as np
import pytest

from condu.report.embedding import FeatureMap
from condu.report.palette import DARK, LIGHT
from condu.report.scatter import MARGIN, WIDTH, scatter
from condu.report.taskmarks import HUES, task_marks


def test_up_to_21_tasks_are_marked_differently() -> None:
    marks = task_marks([f"task {n}" for n in range(21)])
    assert len({(mark.hue, mark.shape) for mark in marks}) == 21
    assert len({mark.hue for mark in marks[:HUES]}) == HUES
    assert len(LIGHT.hues) == len(DARK.hues) == HUES


def layout(*rows: tuple[float, float], prototypes: int = 0) -> FeatureMap:
    """One task of one class; the last of the places are prototypes."""
    places = np.array(rows, dtype=np.float32)
    none = np.zeros(len(rows), dtype=np.int64)
    return FeatureMap(places, none, none, np.arange(len(rows)) >= len(rows) - prototypes)


def on_the_page(x: float) -> float:
    return MARGIN + x * (WIDTH - 2 * MARGIN)


def test_a_name_stands_at_an_image_even_between_two_groups() -> None:
    rows = ((0.0, 0.0), (0.1, 0.0), (0.2, 0.0), (0.9, 0.5), (1.0, 0.5))
    (cloud,) = scatter(layout(*rows, (0.5, 0.25), prototypes=1), {"a": ["b"]}, 1).clouds
    assert (cloud.label.x, cloud.label.y) == pytest.approx((on_the_page(0.2), MARGIN))
    assert any((dot.x, dot.y) == (cloud.label.x, cloud.label.y) for dot in cloud.images)


def test_without_images_it_stands_at_a_prototype() -> None:
    (cloud,) = scatter(layout((0.5, 0.0), prototypes=1), {"a": ["b"]}, 1).clouds
    assert cloud.images == []
    assert (cloud.label.x, cloud.label.y) == pytest.approx((WIDTH / 2, MARGIN))


@pytest.mark.parametrize(("x", "anchor"), [(0.0, "start"), (0.5, "middle"), (1.0, "end")])
def test_names_go_where_there_is_room(x: float, anchor: str) -> None:
    (cloud,) = scatter(layout((x, 0.0)), {"a": ["b"]}, 1).clouds
    assert cloud.label.anchor == anchor
