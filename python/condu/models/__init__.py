"""Vision–language models ready for training: weights, tokenizer and image transforms."""

from __future__ import annotations

from typing import TYPE_CHECKING

from condu.models.clip import ClipModel, load_clip
from condu.models.llava import VqaModel, load_vqa

if TYPE_CHECKING:
    from condu.models.base import LiveModel

__all__ = ["ClipModel", "VqaModel", "load_clip", "load_model", "load_vqa"]


def load_model(name: str, pretrained: str | None = None) -> LiveModel:
    """The model called ``name``, in eval mode, fp32, on the CPU: ``"mini_vqa"``, which comes with
    the package as ``"mini"`` does, or what `load_clip` knows.

    Raises ValueError for an unknown name, and for ``pretrained`` where the weights are shipped.
    """
    if name == "mini_vqa":
        if pretrained is not None:
            raise ValueError(f"model {name!r} ships its weights, got pretrained={pretrained!r}")
        return load_vqa(name)
    return load_clip(name, pretrained)
