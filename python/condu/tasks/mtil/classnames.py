"""How the prompts of MTIL say the names of classes.

A data set's own names, with blanks for underscores, but for the few that nobody would say; those
are OpenAI's for CLIP (github.com/openai/CLIP, data/prompts.md). MTIL keeps torchvision's names of
digits ("0 - zero") and the slashes of SUN397, where OpenAI has "0" and blanks.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

_SPOKEN: Mapping[str, Mapping[str, str]] = {
    "Caltech101": {
        "Faces": "off-center face",
        "Faces_easy": "centered face",
        "Leopards": "leopard",
        "Motorbikes": "motorbike",
        "airplanes": "airplane",
        "car_side": "side of a car",
        "cougar_body": "body of a cougar cat",
        "cougar_face": "face of a cougar cat",
        "crocodile_head": "head of a crocodile",
        "flamingo_head": "head of a flamingo",
        "snoopy": "snoopy (cartoon beagle)",
        "yin_yang": "yin and yang symbol",
    },
    "EuroSAT": {
        "AnnualCrop": "annual crop land",
        "Forest": "forest",
        "HerbaceousVegetation": "brushland or shrubland",
        "Highway": "highway or road",
        "Industrial": "industrial buildings or commercial buildings",
        "Pasture": "pasture land",
        "PermanentCrop": "permanent crop land",
        "Residential": "residential buildings or homes or apartments",
        "River": "river",
        "SeaLake": "lake or sea",
    },
    "Flowers102": {"pink-yellow dahlia?": "pink-yellow dahlia"},
}


def classnames(source: str, own: Sequence[str]) -> tuple[str, ...]:
    """What prompts call the classes that a data set itself calls ``own``, in that order."""
    spoken = _SPOKEN.get(source, {})
    return tuple(spoken.get(name, name.replace("_", " ")) for name in own)
