"""Visual question answering: tasks whose samples are an image, a question and a short answer."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from PIL.Image import Image
from torch.utils.data import Dataset

VqaSample = tuple[Image, str, str]


@dataclass(frozen=True)
class VqaTask:
    """One task: its questions make clear what is asked, no other sign of the task is given.

    load: ``load("train" | "test")`` returns a map-style data set of (RGB image, question, answer),
        the same one each time.
    """

    name: str
    load: Callable[[str], Dataset[VqaSample]]
