"""The reference set of the embedded benchmark: things that none of its tasks shows.

A shape cut out of a texture, on plain ground: a heart of bricks, a star of rising stripes. The
tasks and the corpus show shapes and textures, but never one in the other. The captions use the
corpus's words and name all of what is seen, or less.
"""

from __future__ import annotations

from functools import cache

import numpy as np
from PIL import Image

from condu.tasks.mini import draw
from condu.tasks.mini.concepts import COLOUR_NAMES, SHAPES, TEXTURES, sample_colours
from condu.tasks.mini.corpus import OPENINGS, background, colour_pair
from condu.tasks.reference import ReferenceSet

COUNT = 512


class _Images:
    """uint8 [N, H, W, 3] as images."""

    def __init__(self, pixels: np.ndarray) -> None:
        self.pixels = pixels

    def __len__(self) -> int:
        return len(self.pixels)

    def __getitem__(self, index: int) -> Image.Image:
        return Image.fromarray(self.pixels[index])


@cache
def mini_reference(seed: int = 0) -> ReferenceSet:
    """512 images of 32 × 32 pixels and a caption for each; `seed` decides all of it."""
    rng = np.random.default_rng([seed, COUNT])
    shape, texture = rng.integers(len(SHAPES), size=COUNT), rng.integers(len(TEXTURES), size=COUNT)
    ink, paper = colour_pair(rng, COUNT)
    ground = rng.integers(len(COLOUR_NAMES), size=COUNT)
    centre = draw.SIZE / 2 + rng.uniform(-3, 3, (COUNT, 2))
    radius = rng.uniform(10, 15, COUNT)
    outline = draw.shapes(shape, *draw.frame(centre, radius, rng.uniform(-0.3, 0.3, COUNT)))
    period, tilt = rng.uniform(4, 8, COUNT), rng.uniform(-0.12, 0.12, COUNT)
    pattern = draw.textures(texture, *draw.frame(centre, period, tilt))
    paint = draw.blend(
        np.broadcast_to(
            sample_colours(rng, paper)[:, None, None, :], (COUNT, draw.SIZE, draw.SIZE, 3)
        ),
        sample_colours(rng, ink),
        pattern,
    )
    canvas = draw.blend(background(rng, ground), paint, draw.fill(outline, radius))
    captions = []
    for s, t, i, g in zip(shape, texture, ink, ground, strict=True):
        colour = f"{COLOUR_NAMES[i]} " if rng.random() < 0.3 else ""
        behind = f" on a {COLOUR_NAMES[g]} background" if rng.random() < 0.3 else ""
        captions.append(f"{rng.choice(OPENINGS)}a {SHAPES[s]} of {colour}{TEXTURES[t]}{behind}")
    return ReferenceSet(_Images(draw.finish(rng, canvas, noise=0.04)), tuple(captions))
