"""The prompts of MTIL, by data set; training takes the first, zero-shot heads take all.

They are OpenAI's for CLIP (github.com/openai/CLIP, data/prompts.md) but for Food101, which has an
article here, and for the first of StanfordCars, which MTIL adds.
"""

from __future__ import annotations


def _with(articles: tuple[str, ...], *prompts: str) -> tuple[str, ...]:
    """Every prompt with the first article in the place of its ``@``, then with the second, …"""
    return tuple(prompt.replace("@", article) for article in articles for prompt in prompts)


AIRCRAFT = _with(("a", "the"), "a photo of @ {}, a type of aircraft.")
CALTECH101 = _with(
    ("a", "the"),
    "a photo of @ {}.",
    "a painting of @ {}.",
    "@ plastic {}.",
    "a sculpture of @ {}.",
    "a sketch of @ {}.",
    "a tattoo of @ {}.",
    "@ toy {}.",
    "a rendition of @ {}.",
    "@ embroidered {}.",
    "@ cartoon {}.",
    "@ {} in a video game.",
    "@ plushie {}.",
    "@ origami {}.",
    "art of @ {}.",
    "graffiti of @ {}.",
    "a drawing of @ {}.",
    "a doodle of @ {}.",
)
CIFAR100 = _with(
    ("a", "the"),
    "a photo of @ {}.",
    "a blurry photo of @ {}.",
    "a black and white photo of @ {}.",
    "a low contrast photo of @ {}.",
    "a high contrast photo of @ {}.",
    "a bad photo of @ {}.",
    "a good photo of @ {}.",
    "a photo of @ small {}.",
    "a photo of @ big {}.",
)
DTD = _with(
    ("a", "the"),
    "a photo of @ {} texture.",
    "a photo of @ {} pattern.",
    "a photo of @ {} thing.",
    "a photo of @ {} object.",
)
EUROSAT = _with(("", "a ", "the "), "a centered satellite photo of @{}.")
FLOWERS102 = ("a photo of a {}, a type of flower.",)
FOOD101 = ("a photo of a {}, a type of food.",)
MNIST = ('a photo of the number: "{}".',)
OXFORD_PET = ("a photo of a {}, a type of pet.",)
STANFORD_CARS = (
    "a photo of a {}, a type of car.",
    *_with(("a", "the", "my"), "a photo of @ {}."),
    "i love my {}!",
    *_with(("dirty", "clean", "new", "old"), "a photo of my @ {}."),
)
SUN397 = _with(("a", "the"), "a photo of @ {}.")
