"""The tasks of the mini VQA benchmark: questions with their images in a look of their own.

Four looks come from the classification benchmark (condu.tasks.mini.domains); none of them is
the corpus's.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from condu.tasks.mini import draw
from condu.tasks.mini.concepts import COLOUR_NAMES, SHAPES
from condu.tasks.mini.domains import DOMAINS as LOOKS
from condu.tasks.mini.domains import ink_on_paper, ramp, tones
from condu.tasks.mini_vqa.questions import COUNTS, NUMERALS, PLACES, TASKS

# Canvases float [N, SIZE, SIZE, 3] and what the questions are about, one word each ("" if nothing).
Scene = tuple[np.ndarray, list[str]]


@dataclass(frozen=True)
class VqaDomain:
    """A rendered task: ``scene`` draws images for answers [N] (indices), with ``train`` and
    ``test`` images for each answer."""

    name: str
    answers: tuple[str, ...]
    scene: Callable[[np.random.Generator, np.ndarray], Scene]
    train: int
    test: int

    def questions(self, rng: np.random.Generator, subjects: list[str]) -> list[str]:
        """One of the task's phrasings for each image, at random."""
        phrases = TASKS[self.name]
        chosen = rng.integers(len(phrases), size=len(subjects))
        return [phrases[i].format(subject) for i, subject in zip(chosen, subjects, strict=True)]


def cell_centres(rng: np.random.Generator, cells: np.ndarray, jitter: float) -> np.ndarray:
    """Pixel centres [N, 2] in cells [N] (indices into PLACES), off the middle by ``jitter``."""
    pitch = draw.SIZE / 3
    corner = np.stack([cells % 3, cells // 3], axis=-1)
    return (corner + 0.5) * pitch + rng.uniform(-jitter, jitter, (len(cells), 2))


def other(rng: np.random.Generator, index: np.ndarray, count: int) -> np.ndarray:
    """Random indices below ``count``, each different from its entry of ``index``."""
    return (index + rng.integers(1, count, size=len(index))) % count


def _plain(name: str) -> Callable[[np.random.Generator, np.ndarray], Scene]:
    """The look of a task of the classification benchmark; its class is the answer."""
    (look,) = (domain.look for domain in LOOKS if domain.name == name)
    return lambda rng, answers: (look(rng, answers), [""] * len(answers))


def _digits(rng: np.random.Generator, answers: np.ndarray) -> Scene:
    return ink_on_paper(rng, [NUMERALS[i] for i in answers]), [""] * len(answers)


def _places(rng: np.random.Generator, answers: np.ndarray) -> Scene:
    """Two pale cut-outs on dark striped cloth; the question names one of them."""
    n = len(answers)
    middle, still = np.full((n, 2), draw.SIZE / 2), np.zeros(n)
    stripes = draw.textures(
        rng.integers(4, size=n), *draw.frame(middle, rng.uniform(3, 6, n), still)
    )
    canvas = ramp(tones(rng, n, 0.05, 0.2), tones(rng, n, 0.2, 0.4), stripes)
    asked = rng.integers(len(SHAPES), size=n)
    for kind, cell in ((asked, answers), (other(rng, asked, len(SHAPES)), other(rng, answers, 9))):
        radius = rng.uniform(4.0, 5.2, n)
        centre = cell_centres(rng, cell, 0.8)
        distance = draw.shapes(kind, *draw.frame(centre, radius, rng.uniform(-0.4, 0.4, n)))
        canvas = draw.blend(canvas, tones(rng, n, 0.65, 1.0), draw.fill(distance, radius))
    return canvas, [SHAPES[k] for k in asked]


DOMAINS = (
    VqaDomain("colour", COLOUR_NAMES, _plain("colours"), train=84, test=21),
    VqaDomain("shape", SHAPES, _plain("shapes"), train=100, test=25),
    VqaDomain("count", COUNTS, _plain("counting"), train=112, test=28),
    VqaDomain("place", PLACES, _places, train=112, test=28),
    VqaDomain("digit", NUMERALS, _digits, train=100, test=25),
)
