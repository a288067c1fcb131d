"""Parameter shapes of the models that are measured, from the numbers of their architectures.

Nothing is downloaded: names, order and shapes are those of ``named_parameters()`` of open_clip's
CLIP (arXiv 2103.00020) and of Llama 2 7B (arXiv 2307.09288).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

Shapes = dict[str, tuple[int, ...]]


@dataclass(frozen=True)
class Tower:
    """A transformer encoder of CLIP."""

    width: int
    layers: int
    hidden: int


@dataclass(frozen=True)
class Clip:
    """The numbers that fix a CLIP model's parameters."""

    embedding: int
    vision: Tower
    patch: int
    text: Tower
    image: int = 224
    vocabulary: int = 49408
    context: int = 77

    def shapes(self) -> Shapes:
        vision, text = self.vision.width, self.text.width
        places = (self.image // self.patch) ** 2 + 1
        return {
            "positional_embedding": (self.context, text),
            "text_projection": (text, self.embedding),
            "logit_scale": (),
            "visual.class_embedding": (vision,),
            "visual.positional_embedding": (places, vision),
            "visual.proj": (vision, self.embedding),
            "visual.conv1.weight": (vision, 3, self.patch, self.patch),
            **_affine("visual.ln_pre", vision),
            **_blocks("visual.transformer", self.vision),
            **_affine("visual.ln_post", vision),
            **_blocks("transformer", self.text),
            "token_embedding.weight": (self.vocabulary, text),
            **_affine("ln_final", text),
        }


@dataclass(frozen=True)
class Llama:
    """The numbers that fix a Llama model's parameters (no grouped queries, untied head)."""

    width: int
    layers: int
    hidden: int
    vocabulary: int

    def shapes(self) -> Shapes:
        shapes: Shapes = {"model.embed_tokens.weight": (self.vocabulary, self.width)}
        for layer in range(self.layers):
            name = f"model.layers.{layer}"
            for projection in "qkvo":
                shapes[f"{name}.self_attn.{projection}_proj.weight"] = (self.width, self.width)
            shapes[f"{name}.mlp.gate_proj.weight"] = (self.hidden, self.width)
            shapes[f"{name}.mlp.up_proj.weight"] = (self.hidden, self.width)
            shapes[f"{name}.mlp.down_proj.weight"] = (self.width, self.hidden)
            shapes[f"{name}.input_layernorm.weight"] = (self.width,)
            shapes[f"{name}.post_attention_layernorm.weight"] = (self.width,)
        shapes["model.norm.weight"] = (self.width,)
        shapes["lm_head.weight"] = (self.vocabulary, self.width)
        return shapes


def _affine(name: str, width: int) -> Shapes:
    return {f"{name}.weight": (width,), f"{name}.bias": (width,)}


def _linear(name: str, outputs: int, inputs: int) -> Shapes:
    return {f"{name}.weight": (outputs, inputs), f"{name}.bias": (outputs,)}


def _blocks(name: str, tower: Tower) -> Shapes:
    shapes: Shapes = {}
    width = tower.width
    for layer in range(tower.layers):
        block = f"{name}.resblocks.{layer}"
        shapes |= _affine(f"{block}.ln_1", width)
        shapes[f"{block}.attn.in_proj_weight"] = (3 * width, width)
        shapes[f"{block}.attn.in_proj_bias"] = (3 * width,)
        shapes |= _linear(f"{block}.attn.out_proj", width, width)
        shapes |= _affine(f"{block}.ln_2", width)
        shapes |= _linear(f"{block}.mlp.c_fc", tower.hidden, width)
        shapes |= _linear(f"{block}.mlp.c_proj", width, tower.hidden)
    return shapes


MODELS: dict[str, Callable[[], Shapes]] = {
    "tiny": Clip(32, Tower(128, 2, 512), 32, Tower(64, 2, 256), vocabulary=5000).shapes,
    "ViT-B-16": Clip(512, Tower(768, 12, 3072), 16, Tower(512, 12, 2048)).shapes,
    "ViT-L-14": Clip(768, Tower(1024, 24, 4096), 14, Tower(768, 12, 3072)).shapes,
    "ViT-bigG-14": Clip(1280, Tower(1664, 48, 8192), 14, Tower(1280, 32, 5120)).shapes,
    "Llama-2-7B": Llama(width=4096, layers=32, hidden=11008, vocabulary=32000).shapes,
}
"""By name. ``tiny`` is for a quick look: so small that it measures overheads and caches."""


def parameters(shapes: Shapes) -> int:
    """Number of elements of all tensors."""
    return sum(math.prod(shape) for shape in shapes.values())


def largest(shapes: Shapes) -> int:
    """Number of elements of the largest tensor."""
    return max(math.prod(shape) for shape in shapes.values())
