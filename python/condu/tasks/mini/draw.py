"""Drawing with numpy: fields over the pixels of many small images at once.

Images are float arrays [N, SIZE, SIZE, 3] in [0, 1]. A *frame* holds, for every pixel, its
coordinates in the system of the object drawn there: the object fills about the unit circle,
x points right, y down.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path

import matplotlib
import numpy as np
from PIL import Image, ImageDraw, ImageFont

from condu.tasks.mini.concepts import SHAPES, TEXTURES

SIZE = 32
GLYPH = 48  # pixels a side of a glyph's bitmap
_FONTS = Path(matplotlib.get_data_path()) / "fonts" / "ttf"

Field = np.ndarray  # float64 [N, SIZE, SIZE]


def frame(centre: np.ndarray, radius: np.ndarray, angle: np.ndarray) -> tuple[Field, Field]:
    """Object coordinates of every pixel.

    centre [N, 2] and radius [N] in pixels, angle [N] in radians, clockwise on the screen.
    """
    axis = np.arange(SIZE) + 0.5
    dx = (axis[None, None, :] - centre[:, 0, None, None]) / radius[:, None, None]
    dy = (axis[None, :, None] - centre[:, 1, None, None]) / radius[:, None, None]
    cos, sin = np.cos(angle)[:, None, None], np.sin(angle)[:, None, None]
    return dx * cos + dy * sin, dy * cos - dx * sin


def fill(distance: Field, radius: np.ndarray) -> Field:
    """Coverage in [0, 1] of the inside (distance < 0), with one pixel of smooth edge."""
    return np.clip(0.5 - distance * radius[:, None, None], 0, 1)


def blend(canvas: np.ndarray, colour: np.ndarray, coverage: Field) -> np.ndarray:
    """``canvas`` painted over with ``colour`` ([N, 3] or [N, SIZE, SIZE, 3])."""
    if colour.ndim == 2:
        colour = colour[:, None, None, :]
    return canvas + coverage[..., None] * (colour - canvas)


def _polygon(x: Field, y: Field, corners: int) -> Field:
    normals = np.pi / 2 + 2 * np.pi * np.arange(corners) / corners
    sides = [x * np.cos(a) + y * np.sin(a) for a in normals]
    return np.maximum.reduce(sides) - np.cos(np.pi / corners)


def _star(x: Field, y: Field) -> Field:
    step = 2 * np.pi / 5
    theta = np.abs((np.arctan2(x, -y) + step / 2) % step - step / 2)
    r = np.hypot(x, y)
    tip, notch = np.array([1.0, 0.0]), 0.45 * np.array([np.cos(step / 2), np.sin(step / 2)])
    edge = (notch - tip) / np.linalg.norm(notch - tip)
    return (r * np.cos(theta) - tip[0]) * edge[1] - r * np.sin(theta) * edge[0]


def shape(name: str, x: Field, y: Field) -> Field:
    """Signed distance, roughly, to the outline of one of SHAPES: negative inside."""
    r = np.hypot(x, y)
    match name:
        case "circle":
            return r - 0.9
        case "ring":
            return np.abs(r - 0.7) - 0.22
        case "square":
            return np.maximum(np.abs(x), np.abs(y)) - 0.8
        case "triangle":
            return _polygon(x, y, 3)
        case "diamond":
            return 0.55 * (np.abs(x) / 0.65 + np.abs(y) - 1)
        case "hexagon":
            return _polygon(x, y, 6)
        case "star":
            return _star(x, y)
        case "cross":
            across = np.maximum(np.abs(x) - 0.95, np.abs(y) - 0.28)
            return np.minimum(across, np.maximum(np.abs(x) - 0.28, np.abs(y) - 0.95))
        case "heart":
            return np.hypot(x, 0.2 - 1.1 * y - 0.6 * np.sqrt(np.abs(x))) - 0.85
        case "crescent":
            return np.maximum(r - 0.9, 0.75 - np.hypot(x - 0.5, y))
        case "arrow":
            shaft = np.maximum(np.abs(x + 0.35) - 0.6, np.abs(y) - 0.2)
            return np.minimum(shaft, np.maximum(0.1 - x, 0.7 * (x + np.abs(y) - 0.95)))
        case "thin arrow":
            shaft = np.maximum(np.abs(x) - 0.9, np.abs(y) - 0.1)
            barbs = np.maximum(np.abs(x + np.abs(y) - 0.85) * 0.7 - 0.12, 0.2 - x)
            return np.minimum(shaft, barbs)
        case "chevron":
            return np.maximum(np.abs(x + np.abs(y) - 0.4) * 0.7 - 0.2, np.abs(y) - 0.8)
        case "dart":
            notched = 0.7 * np.maximum(x + 2 * np.abs(y) - 0.95, -0.75 - x - np.abs(y))
            return np.maximum(notched, -0.9 - x)
    raise ValueError(f"unknown shape {name!r}")


def shapes(index: np.ndarray, x: Field, y: Field, names: tuple[str, ...] = SHAPES) -> Field:
    """Signed distance to a different shape per image: ``names[index[n]]`` for image n."""
    distance = np.empty_like(x)
    for i in np.unique(index):
        chosen = index == i
        distance[chosen] = shape(names[i], x[chosen], y[chosen])
    return distance


def _wave(t: Field) -> Field:
    return np.clip(0.5 + 1.5 * np.sin(2 * np.pi * t), 0, 1)


def _texture(name: str, x: Field, y: Field) -> Field:
    match name:
        case "horizontal stripes":
            return _wave(y)
        case "vertical stripes":
            return _wave(x)
        case "rising stripes":
            return _wave((x + y) * 0.7)
        case "falling stripes":
            return _wave((x - y) * 0.7)
        case "checkerboard":
            return np.clip(0.5 + 2 * np.sin(np.pi * x) * np.sin(np.pi * y), 0, 1)
        case "dots":
            return np.clip(2.5 - 6 * np.hypot(x % 1 - 0.5, y % 1 - 0.5), 0, 1)
        case "grid":
            return np.clip(8 * np.maximum(np.abs(x % 1 - 0.5), np.abs(y % 1 - 0.5)) - 3, 0, 1)
        case "rings":
            return _wave(np.hypot(x, y))
        case "waves":
            return _wave(y + 0.35 * np.sin(2 * np.pi * x / 1.5))
        case "bricks":
            along = (x / 2 + 0.5 * (np.floor(y) % 2)) % 1
            joint = np.maximum(np.abs(y % 1 - 0.5), 2 * np.abs(along - 0.5) - 0.5)
            return np.clip(8 * joint - 3, 0, 1)
    raise ValueError(f"unknown texture {name!r}")


def textures(index: np.ndarray, x: Field, y: Field) -> Field:
    """Values in [0, 1] of TEXTURES[index[n]] per image; one period is one unit of the frame."""
    value = np.empty_like(x)
    for i in np.unique(index):
        chosen = index == i
        value[chosen] = _texture(TEXTURES[i], x[chosen], y[chosen])
    return value


@cache
def _glyph(character: str, font: str) -> np.ndarray:
    """Bitmap [GLYPH, GLYPH] in [0, 1], the character's box centred, two thirds of the side high."""
    face = ImageFont.truetype(str(_FONTS / f"{font}.ttf"), GLYPH * 3 // 4)
    image = Image.new("L", (GLYPH, GLYPH))
    left, top, right, bottom = face.getbbox(character)
    origin = ((GLYPH - left - right) / 2, (GLYPH - top - bottom) / 2)
    ImageDraw.Draw(image).text(origin, character, fill=255, font=face)
    return np.asarray(image, dtype=np.float64) / 255


def glyphs(characters: list[str], fonts: list[str], x: Field, y: Field) -> Field:
    """Coverage in [0, 1] of one character per image, read off its bitmap bilinearly."""
    bitmaps = np.stack([_glyph(c, f) for c, f in zip(characters, fonts, strict=True)])
    column = np.clip((x + 1) * GLYPH / 2 - 0.5, 0, GLYPH - 1.001)
    row = np.clip((y + 1) * GLYPH / 2 - 0.5, 0, GLYPH - 1.001)
    c, r = column.astype(int), row.astype(int)
    fc, fr = column - c, row - r
    n = np.arange(len(bitmaps))[:, None, None]
    upper = bitmaps[n, r, c] * (1 - fc) + bitmaps[n, r, c + 1] * fc
    lower = bitmaps[n, r + 1, c] * (1 - fc) + bitmaps[n, r + 1, c + 1] * fc
    return upper * (1 - fr) + lower * fr


def scatter(
    rng: np.random.Generator, n: int, cells: int, jitter: float, margin: float = 0.0
) -> np.ndarray:
    """Pixel centres [n, cells², 2] of a jittered ``cells`` × ``cells`` grid, in random order.

    The grid covers the image but for ``margin`` pixels on each side.
    """
    pitch = (SIZE - 2 * margin) / cells
    axes = np.meshgrid(np.arange(cells), np.arange(cells))
    grid = (np.stack(axes, -1) + 0.5) * pitch + margin
    order = rng.permuted(np.tile(np.arange(cells * cells), (n, 1)), axis=1)
    return grid.reshape(-1, 2)[order] + rng.uniform(-jitter, jitter, (n, cells * cells, 2))


def clouds(rng: np.random.Generator, n: int, cells: int) -> Field:
    """Smooth noise in [0, 1] whose blotches are about SIZE / cells pixels wide."""
    knots = rng.uniform(0, 1, (n, cells + 1, cells + 1))
    at = (np.arange(SIZE) + 0.5) * cells / SIZE
    low, t = at.astype(int), at % 1
    t = t * t * (3 - 2 * t)
    rows = knots[:, low] * (1 - t)[None, :, None] + knots[:, low + 1] * t[None, :, None]
    return rows[:, :, low] * (1 - t) + rows[:, :, low + 1] * t


def finish(rng: np.random.Generator, canvas: np.ndarray, noise: float | np.ndarray) -> np.ndarray:
    """uint8 [N, SIZE, SIZE, 3] from ``canvas`` plus Gaussian pixel noise of deviation ``noise``."""
    noisy = canvas + noise * rng.standard_normal(canvas.shape, dtype=np.float32)
    return (np.clip(noisy, 0, 1) * 255 + 0.5).astype(np.uint8)
