"""Vision–language models ready for training: weights, tokenizer and image transforms."""

from __future__ import annotations

from condu.models.clip import ClipModel, load_clip

__all__ = ["ClipModel", "load_clip"]
