"""The feature space in which experts are voted for, laid out on a plane by t-SNE.

Test images of every data set, and the prototypes of every class, as the frozen model sees them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file
from sklearn.manifold import TSNE
from threadpoolctl import threadpool_limits

from condu.prototypes import PrototypeSet

PERPLEXITY = 30.0


@dataclass(frozen=True)
class FeatureMap:
    """Places of images and prototypes: `places` float32 [n, 2] from 0 to 1, and downwards as far as
    they go; `tasks` and `classes` int64 [n], positions of the task and of the class in it;
    `prototype` bool [n]."""

    places: np.ndarray
    tasks: np.ndarray
    classes: np.ndarray
    prototype: np.ndarray


def feature_map(folder: Path, classes: Mapping[str, Sequence[str]]) -> FeatureMap | None:
    """The map of a run with these tasks and classes, the same at each call. None if the run kept no
    features, as one without a model that votes.

    Raises ValueError naming the file that is broken, or does not fit the tasks.
    """
    file = folder / "features.safetensors"
    prototypes_file = folder / "prototypes.safetensors"
    if not file.exists() or not prototypes_file.exists():
        return None
    sample = _load(file)
    prototypes = PrototypeSet.load(prototypes_file)
    if set(prototypes.tasks) != set(classes):
        raise ValueError(f"{prototypes_file}: prototypes of {prototypes.tasks}, not {[*classes]}")
    vectors, positions, labels, is_prototype = [], [], [], []
    for position, (task, names) in enumerate(classes.items()):
        try:
            images, answers = sample[f"{position}.features"], sample[f"{position}.labels"]
        except KeyError as error:
            raise ValueError(f"{file}: no tensor {error} for task {task!r}") from None
        centres = prototypes[task].numpy()
        if len(centres) != len(names) or images.shape != (len(answers), centres.shape[1]):
            raise ValueError(
                f"{file}: task {task!r} has {len(names)} classes, features {list(images.shape)} "
                f"of {len(answers)} labels, and prototypes {list(centres.shape)}"
            )
        if len(answers) and not 0 <= answers.min() <= answers.max() < len(names):
            wrong = answers[(answers < 0) | (answers >= len(names))][0]
            raise ValueError(f"{file}: task {task!r} has {len(names)} classes, but a label {wrong}")
        vectors += [images, centres]
        positions.append(np.full(len(images) + len(centres), position))
        labels += [answers, np.arange(len(centres))]
        is_prototype.append(np.arange(len(images) + len(centres)) >= len(images))
    return FeatureMap(
        _unit_width(_plane(np.concatenate(vectors))),
        np.concatenate(positions),
        np.concatenate(labels),
        np.concatenate(is_prototype),
    )


def _load(file: Path) -> dict[str, np.ndarray]:
    try:
        return load_file(file)
    except SafetensorError as error:
        raise ValueError(f"{file}: not a readable safetensors file ({error})") from None


def _plane(vectors: np.ndarray) -> np.ndarray:
    perplexity = min(PERPLEXITY, (len(vectors) - 1) / 3)
    layout = TSNE(perplexity=perplexity, init="pca", random_state=0)
    with threadpool_limits(1):  # sums in one order: the same map each time
        return layout.fit_transform(vectors)


def _unit_width(places: np.ndarray) -> np.ndarray:
    """Moved to the origin and scaled, alike in both directions, so that distances can be compared.
    A map that is higher than wide is laid on its side, which says the same."""
    moved = places - places.min(axis=0)
    width, height = moved.max(axis=0)
    if height > width:
        moved, width = moved[:, ::-1], height
    return moved / (width or 1.0)
