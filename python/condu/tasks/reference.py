"""Images and captions of no task, which show what a model knew before it was fine-tuned."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset


@dataclass(frozen=True)
class ReferenceSet:
    """images: a sequence of RGB images. captions: sentences, which need not be about them."""

    images: Any
    captions: tuple[str, ...]

    def dataset(self, transform: Callable[[Image.Image], Tensor]) -> TransformedImages:
        """Data set of float32 tensors [3, H, W]."""
        return TransformedImages(self.images, transform)


class TransformedImages(Dataset[Tensor]):
    """A map-style view of images that went through ``transform``."""

    def __init__(self, images: Any, transform: Callable[[Image.Image], Tensor]) -> None:
        self.images = images
        self.transform = transform

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> Tensor:
        return self.transform(self.images[index])


class ImageFiles:
    """The images in files, read each time that they are asked for."""

    def __init__(self, files: Sequence[Path]) -> None:
        self.files = files

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> Image.Image:
        with Image.open(self.files[index]) as image:
            return image.convert("RGB")


def read_reference(images: Path, captions: Path) -> ReferenceSet:
    """The images in a folder, at any depth, and the captions in a text file, one a line, or in the
    files `*.txt` and `*.tsv` of a folder. What follows a tab is left out, as the addresses in the
    files of Conceptual Captions, and so are empty lines. Images are found by their suffixes.

    Raises:
        ValueError: no such folder or file, or nothing in it; the message begins with the argument.
    """
    known = Image.registered_extensions()
    files = [file for file in sorted(images.rglob("*")) if file.suffix.lower() in known]
    if not files:
        raise ValueError(f"images: there is no image in a folder {str(images)!r}")
    texts = [captions] if captions.is_file() else sorted(captions.glob("*.t[xs][tv]"))
    lines = [
        line.split("\t")[0].strip()
        for text in texts
        for line in text.read_text(encoding="utf-8").splitlines()
    ]
    sentences = tuple(line for line in lines if line)
    if not sentences:
        raise ValueError(f"captions: there is no caption in {str(captions)!r}")
    return ReferenceSet(ImageFiles(files), sentences)
