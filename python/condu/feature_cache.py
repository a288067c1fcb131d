"""What a model makes of images and prompts, kept on disk for other runs with the same weights.

A file is named by a hash of everything that its features depend on, so none is ever out of date;
the folder may be deleted at any time.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import xxhash
from PIL import Image
from safetensors import SafetensorError
from torch import Tensor, nn

from condu.weights import load_weights, save_weights
from condu_ext.fingerprint import fingerprint

if TYPE_CHECKING:
    from condu.tasks.benchmark import TransformedDataset


class FeatureCache:
    """Named tensors in the files of a folder, which is made when something is first kept."""

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        self.folder = Path(folder).expanduser()

    def images(
        self,
        model: nn.Module,
        dataset: TransformedDataset,
        compute: Callable[[], tuple[Tensor, Tensor]],
    ) -> tuple[Tensor, Tensor]:
        """Features [M, D] and labels [M] that ``compute`` gives for a data set under the model's
        weights. Nothing is kept of a source that cannot tell its images from others: that has no
        ``digest()``. OSError if the folder cannot be written."""
        if not hasattr(dataset.source, "digest"):
            return compute()
        which = dataset.source.digest(), digest_of_transform(dataset.transform)
        names = ("features", "labels")
        kept = self._get(
            key_of(model, "images", *which), lambda: dict(zip(names, compute(), strict=True))
        )
        return kept["features"], kept["labels"]

    def text(self, model: nn.Module, tokens: Tensor, compute: Callable[[], Tensor]) -> Tensor:
        """Features that ``compute`` gives for tokens of prompts under the model's weights."""
        key = key_of(model, "prompts", str(list(tokens.shape)), fingerprint(tokens))
        return self._get(key, lambda: {"text": compute()})["text"]

    def _get(self, key: str, compute: Callable[[], dict[str, Tensor]]) -> dict[str, Tensor]:
        """What was kept as ``key``, or else what ``compute`` gives, which is kept then. A file that
        is damaged counts as none."""
        path = self.folder / f"{key}.safetensors"
        try:
            return load_weights(path)
        except (FileNotFoundError, SafetensorError):
            features = compute()
        # under a name of this process, for another run may be about to keep the same
        own = path.with_name(f"{key}-{os.getpid()}.safetensors")
        save_weights(own, features)
        os.replace(own, path)
        return features


def key_of(model: nn.Module, *inputs: str) -> str:
    """Hash of a model's weights, of how it computes at the moment (device, autocast, version of
    torch), and of ``inputs``, which stand for what it is given."""
    device = next(model.parameters()).device.type
    autocast = torch.is_autocast_enabled(device) and torch.get_autocast_dtype(device)
    digest = xxhash.xxh3_128()
    for part in (torch.__version__, device, str(autocast), *inputs):
        digest.update(f"{len(part)} {part}\n".encode())
    for name, tensor in model.state_dict().items():
        facts = f"{name} {tensor.dtype} {list(tensor.shape)} {fingerprint(tensor)}\n"
        digest.update(facts.encode())
    return digest.hexdigest()


def digest_of_transform(transform: Callable[[Any], Tensor]) -> str:
    """Hash of what a transform makes of one image: a number for each pixel, so that sizes, crops,
    interpolation and normalisation all show. For a transform without randomness."""
    pixels = np.random.default_rng(0).integers(0, 256, (210, 330, 3), dtype=np.uint8)
    return fingerprint(transform(Image.fromarray(pixels)))
