"""Image–caption pairs for pretraining: the concepts of the tasks, in a style of their own.

Flat bright colours on plain backgrounds, sans-serif letters, clean shapes and arrows. The
tasks (domains.py) show the same concepts in other fonts, strokes, palettes and noise.
"""

from __future__ import annotations

from collections.abc import Callable

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

FONTS = ("DejaVuSans", "DejaVuSans-Bold", "DejaVuSans-Oblique", "DejaVuSansMono")
ARROWS = ("arrow", "thin arrow")
OPENINGS = ("", "a photo of ", "a picture of ", "an image of ", "a drawing of ")

Pairs = tuple[np.ndarray, list[str]]  # float canvas [N, SIZE, SIZE, 3] and a caption each


def colour_pair(rng: np.random.Generator, n: int) -> tuple[np.ndarray, np.ndarray]:
    """Two different colour indices per image."""
    first = rng.integers(len(COLOUR_NAMES), size=n)
    return first, (first + rng.integers(1, len(COLOUR_NAMES), size=n)) % len(COLOUR_NAMES)


def background(rng: np.random.Generator, colour: np.ndarray) -> np.ndarray:
    """A plain colour, brighter towards a random side."""
    n = len(colour)
    centre = np.full((n, 2), draw.SIZE / 2)
    x, _ = draw.frame(centre, np.full(n, float(draw.SIZE)), rng.uniform(0, 2 * np.pi, n))
    shade = 1 + rng.uniform(0, 0.5, n)[:, None, None] * x
    return np.clip(sample_colours(rng, colour)[:, None, None, :] * shade[..., None], 0, 1)


def _place(
    rng: np.random.Generator, n: int, radius: tuple[float, float], turn: float
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Centre (near the middle), radius and angle of one object per image."""
    centre = draw.SIZE / 2 + rng.uniform(-4, 4, (n, 2))
    return centre, rng.uniform(*radius, n), rng.uniform(-turn, turn, n)


def _describe(
    rng: np.random.Generator, nouns: list[str], ink: np.ndarray, ground: np.ndarray
) -> list[str]:
    """Captions that name each noun, and by chance its colour and the background's."""
    captions = []
    for noun, i, g in zip(nouns, ink, ground, strict=True):
        text = f"{COLOUR_NAMES[i]} {noun}" if rng.random() < 0.3 else noun
        text = rng.choice((f"a {text}", f"the {text}", text))
        if rng.random() < 0.1:
            text += f" on a {COLOUR_NAMES[g]} background"
        captions.append(text)
    return captions


def _characters(rng: np.random.Generator, n: int) -> Pairs:
    ink, ground = colour_pair(rng, n)
    digit = rng.random(n) < 0.3
    numeral, letter = rng.integers(10, size=n), rng.integers(26, size=n)
    symbols, nouns = [], []
    for is_digit, d, k in zip(digit, numeral, letter, strict=True):
        symbols.append(str(d) if is_digit else LETTERS[k].upper())
        word = rng.choice(("digit", "number"))
        nouns.append(f"{word} {NUMBERS[d]}" if is_digit else f"letter {LETTERS[k]}")
    centre, radius, angle = _place(rng, n, (14.0, 21.0), 0.25)
    fonts = [FONTS[i] for i in rng.integers(len(FONTS), size=n)]
    coverage = draw.glyphs(symbols, fonts, *draw.frame(centre, radius, angle))
    canvas = draw.blend(background(rng, ground), sample_colours(rng, ink), coverage)
    return canvas, _describe(rng, nouns, ink, ground)


def _single_shapes(rng: np.random.Generator, n: int) -> Pairs:
    ink, ground = colour_pair(rng, n)
    kind = rng.integers(len(SHAPES), size=n)
    centre, radius, angle = _place(rng, n, (8.0, 15.0), 0.3)
    distance = draw.shapes(kind, *draw.frame(centre, radius, angle))
    stroke = np.abs(distance) - (rng.uniform(0.7, 1.5, n) / radius)[:, None, None]
    hollow = (rng.random(n) < 0.5)[:, None, None]
    coverage = draw.fill(np.where(hollow, stroke, distance), radius)
    canvas = draw.blend(background(rng, ground), sample_colours(rng, ink), coverage)
    return canvas, _describe(rng, [SHAPES[k] for k in kind], ink, ground)


def _arrows(rng: np.random.Generator, n: int) -> Pairs:
    ink, ground = colour_pair(rng, n)
    way = rng.integers(len(DIRECTIONS), size=n)
    centre, radius, tilt = _place(rng, n, (8.0, 15.0), 0.2)
    x, y = draw.frame(centre, radius, tilt + way * np.pi / 4)
    coverage = draw.fill(draw.shapes(rng.integers(len(ARROWS), size=n), x, y, ARROWS), radius)
    canvas = draw.blend(background(rng, ground), sample_colours(rng, ink), coverage)
    return canvas, _describe(rng, [f"arrow pointing {DIRECTIONS[w]}" for w in way], ink, ground)


def _counts(rng: np.random.Generator, n: int) -> Pairs:
    ink, ground = colour_pair(rng, n)
    count, kind = rng.integers(1, 10, size=n), rng.integers(len(SHAPES), size=n)
    canvas, colour = background(rng, ground), sample_colours(rng, ink)
    places = draw.scatter(rng, n, 4, 0.8)
    radius = rng.uniform(2.8, 3.8, n)
    for i in range(count.max()):
        x, y = draw.frame(places[:, i], radius, rng.uniform(-0.3, 0.3, n))
        shown = (i < count)[:, None, None]
        canvas = draw.blend(canvas, colour, shown * draw.fill(draw.shapes(kind, x, y), radius))
    captions = []
    for c, k, i in zip(count, kind, ink, strict=True):
        noun = rng.choice((SHAPES[k], "object", "shape"))
        plural = noun if c == 1 else noun + ("es" if noun[-1] == "s" else "s")
        if rng.random() < 0.3:
            plural = f"{COLOUR_NAMES[i]} {plural}"
        captions.append(f"{NUMBERS[c]} {plural}")
    return canvas, captions


def _textures(rng: np.random.Generator, n: int) -> Pairs:
    ink, ground = colour_pair(rng, n)
    kind = rng.integers(len(TEXTURES), size=n)
    centre, period, angle = _place(rng, n, (5.0, 11.0), 0.12)
    value = draw.textures(kind, *draw.frame(centre, period, angle))
    canvas = draw.blend(background(rng, ground), sample_colours(rng, ink), value)
    captions = []
    for k, i, g in zip(kind, ink, ground, strict=True):
        text = TEXTURES[k]
        if rng.random() < 0.3:
            text = f"{COLOUR_NAMES[i]} {text}"
        if rng.random() < 0.1:
            text += f" on a {COLOUR_NAMES[g]} background"
        captions.append(rng.choice((text, f"{text} texture", f"a pattern of {text}")))
    return canvas, captions


def _patches(rng: np.random.Generator, n: int) -> Pairs:
    """Nothing but a colour."""
    colour = rng.integers(len(COLOUR_NAMES), size=n)
    names = [COLOUR_NAMES[c] for c in colour]
    captions = [
        rng.choice((c, f"{c} background", f"something {c}", f"the colour {c}")) for c in names
    ]
    return background(rng, colour), captions


# Each family of pictures with its share of the corpus.
FAMILIES: tuple[tuple[float, Callable[[np.random.Generator, int], Pairs]], ...] = (
    (0.32, _characters),
    (0.20, _single_shapes),
    (0.14, _arrows),
    (0.16, _counts),
    (0.14, _textures),
    (0.04, _patches),
)


def sample_pairs(rng: np.random.Generator, n: int) -> tuple[np.ndarray, list[str]]:
    """``n`` fresh pairs: uint8 images [n, SIZE, SIZE, 3] and their captions."""
    sizes = rng.multinomial(n, [share for share, _ in FAMILIES])
    images, captions = [], []
    for size, (_, family) in zip(sizes, FAMILIES, strict=True):
        if size:
            canvas, texts = family(rng, int(size))
            brightness = rng.uniform(0.7, 1.1, (size, 1, 1, 1))
            noise = rng.uniform(0, 0.08, (size, 1, 1, 1))
            images.append(draw.finish(rng, canvas * brightness, noise))
            captions += [rng.choice(OPENINGS) + t + rng.choice(("", ".")) for t in texts]
    order = rng.permutation(n)
    return np.concatenate(images)[order], [str(captions[i]) for i in order]
