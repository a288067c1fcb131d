"""The tasks of the mini benchmark: one domain, one look each, none of them the corpus's.

A *look* turns labels [N] into float canvases [N, SIZE, SIZE, 3]. Handwritten digits are real:
scikit-learn's 1797 scans of 8 × 8 pixels.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from condu.tasks.mini import draw
from condu.tasks.mini.concepts import (
    COLOUR_NAMES,
    DIRECTIONS,
    LETTERS,
    NUMBERS,
    SHAPES,
    TEXTURES,
    sample_colours,
)

LETTER_FONTS = (
    "DejaVuSerif",
    "DejaVuSerif-Italic",
    "STIXGeneral",
    "STIXGeneralBol",
    "STIXGeneralItalic",
    "cmr10",
    "cmti10",
    "cmtt10",
)
ARROWS = ("thin arrow", "chevron", "dart")
MARKS = ("cross", "ring", "star", "diamond")

Look = Callable[[np.random.Generator, np.ndarray], np.ndarray]


@dataclass(frozen=True)
class Domain:
    """A rendered task: its words, its look, and images per class in each split."""

    name: str
    classnames: tuple[str, ...]
    templates: tuple[str, ...]
    look: Look
    train: int
    test: int


def ramp(low: np.ndarray, high: np.ndarray, value: draw.Field) -> np.ndarray:
    """Canvas that runs from colour ``low`` [N, 3] to ``high`` [N, 3] as ``value`` goes 0 to 1."""
    return draw.blend(np.broadcast_to(low[:, None, None, :], (*value.shape, 3)), high, value)


def tones(rng: np.random.Generator, n: int, low: float, high: float) -> np.ndarray:
    """Unnamed colours [n, 3]: grey levels in [low, high] with a slight random tint."""
    return np.clip(rng.uniform(low, high, (n, 1)) + rng.uniform(-0.1, 0.1, (n, 3)), 0, 1)


def _centres(rng: np.random.Generator, n: int, slack: float) -> np.ndarray:
    return draw.SIZE / 2 + rng.uniform(-slack, slack, (n, 2))


def _colours(rng: np.random.Generator, labels: np.ndarray) -> np.ndarray:
    """A blob of the colour, unevenly lit, on cloudy grey."""
    n = len(labels)
    canvas = ramp(tones(rng, n, 0.0, 0.5), tones(rng, n, 0.5, 1.0), draw.clouds(rng, n, 4))
    radius = rng.uniform(7, 13, n)
    x, y = draw.frame(_centres(rng, n, 5), radius, rng.uniform(0, np.pi, n))
    wobble = 0.5 * (draw.clouds(rng, n, 5) - 0.5)
    coverage = draw.fill(np.hypot(x, 1.3 * y) - 1 + wobble, radius)
    light = 1 - rng.uniform(0, 0.35, n)[:, None, None] * draw.clouds(rng, n, 3)
    paint = sample_colours(rng, labels, spread=1.3)[:, None, None, :] * light[..., None]
    return draw.blend(canvas, paint, coverage)


def _shapes(rng: np.random.Generator, labels: np.ndarray) -> np.ndarray:
    """Chalk outlines on a dirty blackboard."""
    n = len(labels)
    canvas = ramp(tones(rng, n, 0.0, 0.25), tones(rng, n, 0.25, 0.5), draw.clouds(rng, n, 8))
    radius = rng.uniform(8, 14, n)
    x, y = draw.frame(_centres(rng, n, 3), radius, rng.uniform(-0.5, 0.5, n))
    width = rng.uniform(0.6, 1.3, n) / radius
    outline = np.abs(draw.shapes(labels, x, y)) - width[:, None, None]
    chalk = 0.4 + 0.6 * draw.clouds(rng, n, 12)
    return draw.blend(canvas, tones(rng, n, 0.75, 1.0), draw.fill(outline, radius) * chalk)


def _textures(rng: np.random.Generator, labels: np.ndarray) -> np.ndarray:
    """Faded cloth: finer, low in contrast, unevenly lit."""
    n = len(labels)
    x, y = draw.frame(_centres(rng, n, 16), rng.uniform(3.2, 6.5, n), rng.uniform(-0.25, 0.25, n))
    value = 0.25 + 0.5 * draw.textures(labels, x, y) + 0.5 * (draw.clouds(rng, n, 3) - 0.5)
    dark = sample_colours(rng, rng.integers(len(COLOUR_NAMES), size=n)) * 0.4
    return np.clip(ramp(dark, tones(rng, n, 0.6, 0.9), value), 0, 1)


def _letters(rng: np.random.Generator, labels: np.ndarray) -> np.ndarray:
    return ink_on_paper(rng, [LETTERS[k].upper() for k in labels])


def ink_on_paper(rng: np.random.Generator, characters: list[str]) -> np.ndarray:
    """Ink in serif and italic faces on stained paper."""
    n = len(characters)
    canvas = ramp(tones(rng, n, 0.55, 0.75), tones(rng, n, 0.75, 1.0), draw.clouds(rng, n, 6))
    fonts = [LETTER_FONTS[i] for i in rng.integers(len(LETTER_FONTS), size=n)]
    x, y = draw.frame(_centres(rng, n, 3), rng.uniform(15, 22, n), rng.uniform(-0.3, 0.3, n))
    coverage = draw.glyphs(characters, fonts, x, y)
    fading = 0.5 + 0.5 * draw.clouds(rng, n, 5)
    return draw.blend(canvas, tones(rng, n, 0.1, 0.3), coverage * fading)


def _counting(rng: np.random.Generator, labels: np.ndarray) -> np.ndarray:
    """One to nine marks of one kind on cloudy ground, away from the edge.

    The training crop takes up to 10 % of the area off: a mark cut off would make the label wrong.
    """
    n = len(labels)
    canvas = ramp(tones(rng, n, 0.1, 0.3), tones(rng, n, 0.3, 0.5), draw.clouds(rng, n, 3))
    kind = rng.integers(len(MARKS), size=n)
    places = draw.scatter(rng, n, 4, 0.8, margin=1.5)
    for i in range(labels.max() + 1):
        radius = rng.uniform(2.2, 3.4, n)
        x, y = draw.frame(places[:, i], radius, rng.uniform(-0.8, 0.8, n))
        coverage = draw.fill(draw.shapes(kind, x, y, MARKS), radius)
        shown = (i <= labels)[:, None, None]
        canvas = draw.blend(canvas, tones(rng, n, 0.6, 1.0), shown * coverage)
    return canvas


def _directions(rng: np.random.Generator, labels: np.ndarray) -> np.ndarray:
    """Thin arrows, chevrons and darts over faint stripes."""
    n = len(labels)
    hatch = rng.integers(4, size=n)
    x, y = draw.frame(_centres(rng, n, 8), rng.uniform(3, 6, n), np.zeros(n))
    ground = 0.3 * draw.textures(hatch, x, y) + 0.7 * draw.clouds(rng, n, 4)
    canvas = ramp(tones(rng, n, 0.45, 0.65), tones(rng, n, 0.7, 1.0), ground)
    radius = rng.uniform(8, 14, n)
    angle = labels * np.pi / 4 + rng.uniform(-0.3, 0.3, n)
    x, y = draw.frame(_centres(rng, n, 3), radius, angle)
    distance = draw.shapes(rng.integers(len(ARROWS), size=n), x, y, ARROWS)
    ink = sample_colours(rng, rng.integers(len(COLOUR_NAMES), size=n)) * 0.5
    return draw.blend(canvas, ink, draw.fill(distance, radius))


DOMAINS = (
    Domain(
        "colours",
        COLOUR_NAMES,
        ("a photo of something {}.", "the colour {}.", "a {} shape.", "a {} picture."),
        _colours,
        train=100,
        test=25,
    ),
    Domain(
        "shapes",
        SHAPES,
        ("a drawing of a {}.", "a photo of a {}.", "a {}.", "the {}."),
        _shapes,
        train=120,
        test=30,
    ),
    Domain(
        "textures",
        TEXTURES,
        ("a photo of a pattern of {}.", "{}.", "a picture of {} texture.", "a pattern of {}."),
        _textures,
        train=120,
        test=30,
    ),
    Domain(
        "letters",
        LETTERS,
        ("a photo of the letter {}.", "the letter {}.", "a letter {}.", "an image of a letter {}."),
        _letters,
        train=50,
        test=12,
    ),
    Domain(
        "counting",
        NUMBERS[1:],
        ("a photo of {} objects.", "{} objects.", "{} shapes.", "a picture of {} shapes."),
        _counting,
        train=130,
        test=33,
    ),
    Domain(
        "directions",
        DIRECTIONS,
        ("a photo of an arrow pointing {}.", "an arrow pointing {}.", "the arrow pointing {}."),
        _directions,
        train=150,
        test=38,
    ),
)
DIGIT_TEMPLATES = ("a photo of the digit {}.", "the digit {}.", "the number {}.", "a digit {}.")
