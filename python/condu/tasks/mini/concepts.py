"""The things that the mini world can show, and the words for them."""

from __future__ import annotations

import numpy as np

NUMBERS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
LETTERS = tuple("abcdefghijklmnopqrstuvwxyz")
SHAPES = (
    "circle",
    "ring",
    "square",
    "triangle",
    "diamond",
    "hexagon",
    "star",
    "cross",
    "heart",
    "crescent",
)
TEXTURES = (
    "horizontal stripes",
    "vertical stripes",
    "rising stripes",
    "falling stripes",
    "checkerboard",
    "dots",
    "grid",
    "rings",
    "waves",
    "bricks",
)
# In steps of 45 degrees, clockwise on the screen, from "right".
DIRECTIONS = (
    "right",
    "down right",
    "down",
    "down left",
    "left",
    "up left",
    "up",
    "up right",
)

# Name: lowest and highest hue, saturation and value, all in [0, 1]; hue wraps around.
COLOURS = {
    "red": ((-0.02, 0.80, 0.70), (0.02, 1.00, 1.00)),
    "orange": ((0.06, 0.85, 0.90), (0.09, 1.00, 1.00)),
    "yellow": ((0.14, 0.75, 0.90), (0.18, 1.00, 1.00)),
    "green": ((0.27, 0.60, 0.45), (0.39, 1.00, 0.90)),
    "cyan": ((0.47, 0.60, 0.80), (0.52, 1.00, 1.00)),
    "blue": ((0.59, 0.70, 0.55), (0.66, 1.00, 1.00)),
    "purple": ((0.73, 0.55, 0.40), (0.79, 1.00, 0.80)),
    "pink": ((0.88, 0.30, 0.90), (0.95, 0.60, 1.00)),
    "brown": ((0.05, 0.55, 0.30), (0.09, 0.80, 0.50)),
    "black": ((0.00, 0.00, 0.00), (1.00, 0.20, 0.12)),
    "grey": ((0.00, 0.00, 0.40), (1.00, 0.08, 0.65)),
    "white": ((0.00, 0.00, 0.92), (1.00, 0.05, 1.00)),
}
COLOUR_NAMES = tuple(COLOURS)
_LOW, _HIGH = (np.array([bounds[i] for bounds in COLOURS.values()]) for i in (0, 1))


def sample_colours(rng: np.random.Generator, index: np.ndarray, spread: float = 1.0) -> np.ndarray:
    """RGB in [0, 1], [N, 3], for colours ``index`` [N] into COLOUR_NAMES.

    ``spread`` widens (above 1) or narrows the range that a name covers around its centre.
    """
    centre, half = (_LOW + _HIGH)[index] / 2, spread * (_HIGH - _LOW)[index] / 2
    hsv = centre + half * rng.uniform(-1, 1, (len(index), 3))
    hue = hsv[:, :1]
    saturation, value = np.clip(hsv[:, 1:2], 0, 1), np.clip(hsv[:, 2:], 0, 1)
    sector = (hue * 6 + np.array([5.0, 3.0, 1.0])) % 6
    return value - value * saturation * np.clip(np.minimum(sector, 4 - sector), 0, 1)
