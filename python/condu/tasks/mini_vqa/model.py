"""The mini VQA model: a LLaVA from ``assets/model.json`` with a tokenizer of whole words."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from open_clip.transform import image_transform
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers
from torch import Tensor, nn
from transformers import LlavaConfig, LlavaForConditionalGeneration, PreTrainedTokenizerFast

from condu.models.clip import AUGMENTATION
from condu.models.llava import VqaModel
from condu.tasks.mini.model import MEAN, STD
from condu.tasks.mini_vqa.questions import vocabulary

ASSETS = Path(__file__).parent / "assets"
WEIGHTS = ASSETS / "weights.safetensors"
PAD, UNKNOWN, END, IMAGE, ANSWER = SPECIAL = ("<pad>", "<unk>", "</s>", "<image>", "<answer>")

# Parts of parameter names: open_clip's and transformers'.
_TOWER_NAMES = {
    "class_embedding": "embeddings.class_embedding",
    "positional_embedding": "embeddings.position_embedding.weight",
    "conv1": "embeddings.patch_embedding",
    "ln_pre": "pre_layrnorm",
    "ln_post": "post_layernorm",
    "transformer.resblocks": "encoder.layers",
    "ln_1": "layer_norm1",
    "ln_2": "layer_norm2",
    "mlp.c_fc": "mlp.fc1",
    "mlp.c_proj": "mlp.fc2",
    "attn": "self_attn",
}


def model_config() -> dict[str, Any]:
    """Keyword arguments of ``transformers.LlavaConfig``."""
    return json.loads((ASSETS / "model.json").read_text())


def build_tokenizer() -> Tokenizer:
    """Lower-case words and punctuation marks, one id each; what ``assets/tokenizer.json`` holds."""
    ids = {word: i for i, word in enumerate((*SPECIAL, *vocabulary()))}
    tokenizer = Tokenizer(models.WordLevel(ids, unk_token=UNKNOWN))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.add_special_tokens(list(SPECIAL))
    return tokenizer


def load_tokenizer() -> PreTrainedTokenizerFast:
    """The shipped tokenizer; words that it does not know become ``unk_token``."""
    return PreTrainedTokenizerFast(
        tokenizer_file=str(ASSETS / "tokenizer.json"),
        pad_token=PAD,
        unk_token=UNKNOWN,
        eos_token=END,
    )


def build_vqa() -> VqaModel:
    """The model with fresh random weights (from torch's global generator), fp32, in eval mode."""
    config = model_config()
    size, mean, std = config["vision_config"]["image_size"], (MEAN,) * 3, (STD,) * 3
    return VqaModel(
        name="mini_vqa",
        model=LlavaForConditionalGeneration(LlavaConfig(**config)).eval(),
        tokenizer=load_tokenizer(),
        prompt=IMAGE * config["image_seq_length"] + "{}" + ANSWER,
        train_transform=image_transform(size, True, mean, std, aug_cfg=AUGMENTATION),
        test_transform=image_transform(size, False, mean, std),
    )


@torch.no_grad()
def copy_vision_tower(clip: nn.Module, llava: nn.Module) -> None:
    """Copy open_clip's vision tower ``clip`` into transformers' ``llava``, which may have fewer
    layers; otherwise they are the same transformer under other names, but that open_clip keeps
    query, key and value in one matrix. KeyError for a tensor that ``clip`` does not have."""
    tower: dict[str, Tensor] = {}
    for name, tensor in clip.state_dict().items():
        for theirs, ours in _TOWER_NAMES.items():
            name = name.replace(theirs, ours)
        if "in_proj_" in name:
            for part, rows in zip("qkv", tensor.chunk(3), strict=True):
                tower[name.replace("in_proj_", f"{part}_proj.")] = rows
        else:
            tower[name] = tensor
    for name, parameter in llava.named_parameters():
        parameter.copy_(tower[name])
