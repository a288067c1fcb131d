"""Images with questions and answers for pretraining, in a style of their own.

Flat bright colours on plain grounds and sans-serif digits, as in the corpus of the classification
benchmark; the tasks (domains.py) show the same things in other looks and ask in other phrasings.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from condu.tasks.mini import draw
from condu.tasks.mini.concepts import COLOUR_NAMES, SHAPES, sample_colours
from condu.tasks.mini.corpus import FONTS, background, colour_pair
from condu.tasks.mini_vqa.domains import cell_centres, other
from condu.tasks.mini_vqa.questions import CORPUS, COUNTS, NOUNS, NUMERALS, PLACES, PLURALS

TURNS = 3  # questions asked about each image

# Kind of question (a key of CORPUS), what it is about, and the answer.
Fact = tuple[str, str, str]
# Float canvas [N, SIZE, SIZE, 3]; of each image TURNS facts or more, no two with one answer to one
# question: the model reads the earlier turns when it answers the next.
Images = tuple[np.ndarray, list[list[Fact]]]
Turn = tuple[str, str]  # question and answer


def _single_objects(rng: np.random.Generator, n: int) -> Images:
    """One large object, filled or hollow, near the middle."""
    ink, ground = colour_pair(rng, n)
    kind, noun = rng.integers(len(SHAPES), size=n), rng.choice(NOUNS, n)
    centre, radius = draw.SIZE / 2 + rng.uniform(-4, 4, (n, 2)), rng.uniform(7.0, 15.0, n)
    distance = draw.shapes(kind, *draw.frame(centre, radius, rng.uniform(-0.3, 0.3, n)))
    stroke = np.abs(distance) - (rng.uniform(0.7, 1.5, n) / radius)[:, None, None]
    hollow = (rng.random(n) < 0.5)[:, None, None]
    coverage = draw.fill(np.where(hollow, stroke, distance), radius)
    canvas = draw.blend(background(rng, ground), sample_colours(rng, ink), coverage)
    facts = []
    for i in range(n):
        shape, colour = SHAPES[kind[i]], COLOUR_NAMES[ink[i]]
        facts.append(
            [
                ("shape", rng.choice((noun[i], f"{colour} {noun[i]}")), shape),
                ("colour", rng.choice((noun[i], shape)), colour),
                ("colour", "background", COLOUR_NAMES[ground[i]]),
            ]
        )
    return canvas, facts


def _object_pairs(rng: np.random.Generator, n: int) -> Images:
    """Two small objects of different shapes and colours in different cells of the grid."""
    ink, ground = colour_pair(rng, n)
    kind, cell = rng.integers(len(SHAPES), size=n), rng.integers(len(PLACES), size=n)
    pair = (
        (kind, cell, ink),
        (other(rng, kind, len(SHAPES)), other(rng, cell, len(PLACES)), _third(rng, ink, ground)),
    )
    canvas = background(rng, ground)
    for shape, place, colour in pair:
        radius = rng.uniform(3.5, 5.2, n)
        x, y = draw.frame(cell_centres(rng, place, 0.8), radius, rng.uniform(-0.3, 0.3, n))
        coverage = draw.fill(draw.shapes(shape, x, y), radius)
        canvas = draw.blend(canvas, sample_colours(rng, colour), coverage)
    guess = rng.integers(len(SHAPES), size=n)
    facts: list[list[Fact]] = []
    for i in range(n):
        shown = [SHAPES[shape[i]] for shape, _, _ in pair]
        facts.append([("presence", SHAPES[guess[i]], "yes" if SHAPES[guess[i]] in shown else "no")])
        for shape, place, colour in pair:
            words = SHAPES[shape[i]], PLACES[place[i]], COLOUR_NAMES[colour[i]]
            subject = rng.choice((words[0], f"{words[2]} {rng.choice(NOUNS)}"))
            facts[i].append(("place", subject, words[1]))
            facts[i].append(
                ("colour", words[0], words[2])
                if rng.random() < 0.5
                else ("shape", f"{words[2]} {rng.choice(NOUNS)}", words[0])
            )
    return canvas, facts


def _third(rng: np.random.Generator, first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """Colour indices that differ from both of the given ones."""
    low, high = np.minimum(first, second), np.maximum(first, second)
    third = rng.integers(len(COLOUR_NAMES) - 2, size=len(first))
    third += third >= low
    return third + (third >= high)


def _counts(rng: np.random.Generator, n: int) -> Images:
    """One to nine small objects of one kind."""
    ink, ground = colour_pair(rng, n)
    more, kind = rng.integers(len(COUNTS), size=n), rng.integers(len(SHAPES), size=n)
    canvas, colour = background(rng, ground), sample_colours(rng, ink)
    places, radius = draw.scatter(rng, n, 4, 0.8), rng.uniform(2.6, 3.8, n)
    for i in range(len(COUNTS)):
        x, y = draw.frame(places[:, i], radius, rng.uniform(-0.3, 0.3, n))
        shown = (i <= more)[:, None, None]
        canvas = draw.blend(canvas, colour, shown * draw.fill(draw.shapes(kind, x, y), radius))
    facts = [
        [
            ("count", PLURALS[rng.choice((*NOUNS, SHAPES[kind[i]]))], COUNTS[more[i]]),
            ("shape", rng.choice(NOUNS), SHAPES[kind[i]]),
            ("colour", rng.choice(NOUNS), COLOUR_NAMES[ink[i]]),
        ]
        for i in range(n)
    ]
    return canvas, facts


def _digits(rng: np.random.Generator, n: int) -> Images:
    """A sans-serif digit."""
    ink, ground = colour_pair(rng, n)
    digit, font = rng.integers(10, size=n), rng.integers(len(FONTS), size=n)
    centre, radius = draw.SIZE / 2 + rng.uniform(-4, 4, (n, 2)), rng.uniform(14.0, 21.0, n)
    frame = draw.frame(centre, radius, rng.uniform(-0.25, 0.25, n))
    coverage = draw.glyphs([NUMERALS[d] for d in digit], [FONTS[f] for f in font], *frame)
    canvas = draw.blend(background(rng, ground), sample_colours(rng, ink), coverage)
    facts = [
        [
            ("digit", "", NUMERALS[digit[i]]),
            ("colour", "digit", COLOUR_NAMES[ink[i]]),
            ("colour", "background", COLOUR_NAMES[ground[i]]),
        ]
        for i in range(n)
    ]
    return canvas, facts


# Each family of images with its share of the corpus.
FAMILIES: tuple[tuple[float, Callable[[np.random.Generator, int], Images]], ...] = (
    (0.25, _single_objects),
    (0.35, _object_pairs),
    (0.20, _counts),
    (0.20, _digits),
)


def sample_conversations(rng: np.random.Generator, n: int) -> tuple[np.ndarray, list[list[Turn]]]:
    """``n`` fresh samples: uint8 images [n, SIZE, SIZE, 3] and TURNS turns about each."""
    sizes = rng.multinomial(n, [share for share, _ in FAMILIES])
    images: list[np.ndarray] = []
    conversations: list[list[Turn]] = []
    for size, (_, family) in zip(sizes, FAMILIES, strict=True):
        if size:
            canvas, facts = family(rng, int(size))
            brightness = rng.uniform(0.7, 1.1, (size, 1, 1, 1))
            noise = rng.uniform(0, 0.08, (size, 1, 1, 1))
            images.append(draw.finish(rng, canvas * brightness, noise))
            conversations += [
                [_turn(rng, *known[i]) for i in rng.permutation(len(known))[:TURNS]]
                for known in facts
            ]
    order = rng.permutation(n)
    return np.concatenate(images)[order], [conversations[i] for i in order]


def _turn(rng: np.random.Generator, kind: str, subject: str, answer: str) -> Turn:
    phrases = CORPUS[kind]
    return phrases[rng.integers(len(phrases))].format(subject), answer
