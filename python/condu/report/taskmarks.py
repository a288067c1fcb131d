"""One colour and one shape for each task, the same in every chart of a page and in the legends."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

HUES = 7
"""Colours that colour-blind readers can tell apart; a shape for each round of them."""
SHAPES = ("circle", "square", "triangle")


@dataclass(frozen=True)
class TaskMark:
    """`hue` is a position among the page's hues, `shape` one of SHAPES."""

    task: str
    hue: int
    shape: str


def task_marks(tasks: Sequence[str]) -> list[TaskMark]:
    """The marks of tasks, which are told apart up to 21 of them."""
    return [
        TaskMark(task, place % HUES, SHAPES[place // HUES % len(SHAPES)])
        for place, task in enumerate(tasks)
    ]
