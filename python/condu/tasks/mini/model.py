"""The mini CLIP: an open_clip model from ``assets/model.json`` with its own small vocabulary."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from open_clip.model import CLIP
from open_clip.tokenizer import SimpleTokenizer
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

ASSETS = Path(__file__).parent / "assets"
WEIGHTS = ASSETS / "weights.safetensors"
MEAN, STD = 0.5, 0.25  # of a channel in [0, 1], for every channel


def model_config() -> dict[str, Any]:
    """Keyword arguments of ``open_clip.model.CLIP``."""
    return json.loads((ASSETS / "model.json").read_text())


class MiniTokenizer:
    """open_clip's byte-pair tokenizer, its ids remapped to the few that the known words use.

    Id 0 pads; the others keep open_clip's order, so end-of-text stays the highest id: open_clip
    pools text features there, at the argmax of the ids.
    """

    def __init__(self, context_length: int | None = None) -> None:
        self._bpe = SimpleTokenizer()
        words: list[str] = json.loads((ASSETS / "vocabulary.json").read_text())
        used = {i for word in words for i in self._bpe.encode(word)}
        ordered = [*sorted(used), self._bpe.sot_token_id, self._bpe.eot_token_id]
        self._ids = {old: new for new, old in enumerate(ordered, start=1)}
        self.vocab_size = len(ordered) + 1
        self.context_length = context_length or model_config()["text_cfg"]["context_length"]

    def encode(self, text: str) -> list[int]:
        """Ids of ``text`` without start and end; ValueError naming the first unknown word."""
        ids: list[int] = []
        for word in self._bpe.pat.findall(self._bpe.clean_fn(text)):
            pieces = self._bpe.encode(word)
            if not all(piece in self._ids for piece in pieces):
                raise ValueError(f"the mini model does not know the word {word!r} of {text!r}")
            ids += [self._ids[piece] for piece in pieces]
        return ids

    def __call__(self, texts: str | Sequence[str]) -> Tensor:
        """int64 [N, context_length]; ValueError for unknown words and for texts too long."""
        texts = [texts] if isinstance(texts, str) else texts
        tokens = torch.zeros(len(texts), self.context_length, dtype=torch.int64)
        start, end = self._ids[self._bpe.sot_token_id], self._ids[self._bpe.eot_token_id]
        for row, text in zip(tokens, texts, strict=True):
            ids = [start, *self.encode(text), end]
            if len(ids) > self.context_length:
                raise ValueError(
                    f"{text!r} has {len(ids)} tokens, the mini model reads {self.context_length}"
                )
            row[: len(ids)] = torch.tensor(ids)
        return tokens


def image_tensor(images: np.ndarray) -> Tensor:
    """uint8 [N, H, W, 3] to the model's input, float32 [N, 3, H, W]."""
    scaled = torch.from_numpy(images).permute(0, 3, 1, 2).float() / 255
    return (scaled - MEAN) / STD


def build_model() -> CLIP:
    """The mini CLIP with fresh random weights (from torch's global generator)."""
    return CLIP(**model_config())


def save_weights(model: nn.Module, path: Path) -> None:
    """Write all parameters as fp16 safetensors."""
    tensors = {name: p.detach().to("cpu", torch.float16) for name, p in model.state_dict().items()}
    save_file(tensors, path)


def load_weights(model: nn.Module, path: Path) -> None:
    """Read what save_weights wrote into ``model``, every tensor of it, nothing else."""
    tensors = {name: tensor.float() for name, tensor in load_file(path).items()}
    model.load_state_dict(tensors, strict=True)
