"""What can be asked about the small images: phrasings, answers, and all words of both.

The corpus of pretraining asks in other phrasings than the tasks, made of the same words: a word
that pretraining never saw would mean nothing to the model, and LoRA leaves word vectors alone.
"""

from __future__ import annotations

import re

from condu.tasks.mini.concepts import COLOUR_NAMES, NUMBERS, SHAPES

COUNTS = NUMBERS[1:]
NUMERALS = tuple("0123456789")
# The cells of a 3 × 3 grid, row by row.
PLACES = (
    "top left",
    "top",
    "top right",
    "left",
    "middle",
    "right",
    "bottom left",
    "bottom",
    "bottom right",
)
NOUNS = ("object", "shape", "thing")
PLURALS = {noun: noun + ("es" if noun[-1] == "s" else "s") for noun in (*NOUNS, *SHAPES)}

# What each of these asks about, {}, is a noun, a shape, a colour or a combination of them.
CORPUS = {
    "colour": (
        "what colour is the {}?",
        "which colour does the {} have?",
        "tell me the colour of the {}.",
    ),
    "shape": (
        "what shape is the {}?",
        "which shape does the {} have?",
        "tell me the shape of the {}.",
    ),
    "count": (
        "how many {} are there?",
        "what number of {} does the image show?",
        "count the {} in the image.",
    ),
    "place": (
        "where is the {}?",
        "in which part of the image is the {}?",
        "tell me the place of the {}.",
    ),
    "digit": (
        "what digit is this?",
        "which digit does the image show?",
        "tell me the digit in the image.",
    ),
    "presence": (
        "is there a {}?",
        "does the image show a {}?",
    ),
}
TASKS = {
    "colour": ("tell me which colour the {} is.", "what is the colour of the {} in the image?"),
    "shape": ("tell me what shape this is.", "which shape is there in the image?"),
    "count": ("tell me how many things there are.", "what is the number of things in the image?"),
    "place": ("tell me where the {} is.", "the {} is in which part?"),
    "digit": ("tell me which digit this is.", "what is the digit in the image?"),
}


def vocabulary() -> list[str]:
    """Every word and punctuation mark of corpus and tasks, sorted."""
    phrases = [phrase for group in (CORPUS, TASKS) for p in group.values() for phrase in p]
    names = [*COLOUR_NAMES, *SHAPES, *PLURALS, *PLURALS.values(), *COUNTS, *NUMERALS, *PLACES]
    text = " ".join([*phrases, *names, "background", "yes", "no"]).replace("{}", " ")
    return sorted(set(re.findall(r"\w+|[^\w\s]", text)))
