"""The tasks of the mini VQA benchmark: questions with their images in a look of their own.

None of the looks is the corpus's; two are those of the classification benchmark
(condu.tasks.mini.domains).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from condu.tasks.mini import draw
from condu.tasks.mini.concepts import COLOUR_NAMES, SHAPES, sample_colours
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


def _outlines(rng: np.random.Generator, answers: np.ndarray) -> Scene:
    """Chalk outlines on a blackboard, the classification benchmark's look of shapes."""
    (look,) = (domain.look for domain in LOOKS if domain.name == "shapes")
    return look(rng, answers), [""] * len(answers)


def _digits(rng: np.random.Generator, answers: np.ndarray) -> Scene:
    return ink_on_paper(rng, [NUMERALS[i] for i in answers]), [""] * len(answers)


def _counts(rng: np.random.Generator, answers: np.ndarray) -> Scene:
    """One to nine small marks, each of another kind and tone, on cloudy ground."""
    n = len(answers)
    canvas = ramp(tones(rng, n, 0.1, 0.3), tones(rng, n, 0.3, 0.5), draw.clouds(rng, n, 6))
    # away from the edge: a mark that the training crop cut off would make the answer wrong
    places = draw.scatter(rng, n, 4, 0.8, margin=1.5)
    for i in range(len(COUNTS)):
        radius = rng.uniform(2.0, 3.0, n)
        x, y = draw.frame(places[:, i], radius, rng.uniform(-0.8, 0.8, n))
        distance = draw.shapes(rng.integers(len(SHAPES), size=n), x, y)
        shown = (i <= answers)[:, None, None]
        canvas = draw.blend(canvas, tones(rng, n, 0.45, 1.0), shown * draw.fill(distance, radius))
    return canvas, [""] * n


def _colours(rng: np.random.Generator, answers: np.ndarray) -> Scene:
    """An unevenly lit object anywhere on clouds."""
    n = len(answers)
    canvas = ramp(tones(rng, n, 0.0, 0.5), tones(rng, n, 0.5, 1.0), draw.clouds(rng, n, 4))
    light = 1 - 0.4 * draw.clouds(rng, n, 3)
    paint = sample_colours(rng, answers, spread=1.3)[:, None, None, :] * light[..., None]
    cell, radius = rng.integers(len(PLACES), size=n), rng.uniform(4.0, 5.2, n)
    return _object(rng, canvas, cell, radius, paint)


def _places(rng: np.random.Generator, answers: np.ndarray) -> Scene:
    """A small pale cut-out on dark striped cloth."""
    n = len(answers)
    cloth = draw.frame(np.full((n, 2), draw.SIZE / 2), rng.uniform(3, 6, n), np.zeros(n))
    stripes = draw.textures(rng.integers(4, size=n), *cloth)
    canvas = ramp(tones(rng, n, 0.05, 0.2), tones(rng, n, 0.2, 0.4), stripes)
    return _object(rng, canvas, answers, rng.uniform(2.5, 4.0, n), tones(rng, n, 0.5, 1.0))


def _object(
    rng: np.random.Generator,
    canvas: np.ndarray,
    cell: np.ndarray,
    radius: np.ndarray,
    paint: np.ndarray,
) -> Scene:
    """``canvas`` with an object of any shape in ``cell`` [N], and the names of the shapes."""
    kind = rng.integers(len(SHAPES), size=len(cell))
    angle = rng.uniform(-0.4, 0.4, len(cell))
    x, y = draw.frame(cell_centres(rng, cell, 0.8), radius, angle)
    coverage = draw.fill(draw.shapes(kind, x, y), radius)
    return draw.blend(canvas, paint, coverage), [SHAPES[k] for k in kind]


DOMAINS = (
    VqaDomain("colour", COLOUR_NAMES, _colours, train=84, test=21),
    VqaDomain("shape", SHAPES, _outlines, train=100, test=25),
    VqaDomain("count", COUNTS, _counts, train=112, test=28),
    VqaDomain("place", PLACES, _places, train=112, test=28),
    VqaDomain("digit", NUMERALS, _digits, train=100, test=25),
)
