"""Small models of three architectures with random weights, in files and folders as users have."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import torch
from open_clip.model import CLIP
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    CLIPImageProcessorPil,
    LlamaConfig,
    LlamaForCausalLM,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)

SHARD = "40KB"
"""Size of a weight file: each model has several."""
_TEXT = {
    "vocab_size": 40,
    "hidden_size": 32,
    "intermediate_size": 80,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}
_VISION = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 16,
    "patch_size": 8,
    "projection_dim": 32,
}
OPEN_CLIP: dict[str, Any] = {
    "embed_dim": 16,
    "vision_cfg": {"image_size": 16, "patch_size": 8, "width": 32, "layers": 2, "head_width": 16},
    "text_cfg": {"context_length": 8, "vocab_size": 40, "width": 32, "heads": 2, "layers": 2},
}


def llama(
    folder: Path, *, seed: int, dtype: torch.dtype = torch.float32, tied: bool = False
) -> LlamaForCausalLM:
    """A language model with its tokenizer in a sharded folder; ``tied``: embeddings and head."""
    torch.manual_seed(seed)
    model = LlamaForCausalLM(LlamaConfig(**_TEXT, tie_word_embeddings=tied)).to(dtype).eval()
    model.save_pretrained(folder, max_shard_size=SHARD)
    _tokenizer().save_pretrained(folder)
    return model


def llava(
    folder: Path, *, seed: int, dtype: torch.dtype = torch.float32
) -> LlavaForConditionalGeneration:
    """A vision-language model with its processor in a sharded folder."""
    torch.manual_seed(seed)
    config = LlavaConfig(
        vision_config={"model_type": "clip_vision_model", **_VISION},
        text_config={"model_type": "llama", **_TEXT},
        image_token_index=3,
        image_seq_length=4,
    )
    model = LlavaForConditionalGeneration(config).to(dtype).eval()
    model.save_pretrained(folder, max_shard_size=SHARD)
    size = _VISION["image_size"]
    LlavaProcessor(
        image_processor=CLIPImageProcessorPil(
            size={"shortest_edge": size}, crop_size={"height": size, "width": size}
        ),
        tokenizer=_tokenizer(),
        patch_size=_VISION["patch_size"],
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
    ).save_pretrained(folder)
    return model


def clip(file: Path, *, seed: int, dtype: torch.dtype = torch.float32) -> CLIP:
    """An open_clip model in one file: ``.safetensors``, or ``.pt`` as its trainer writes it."""
    torch.manual_seed(seed)
    model = CLIP(**OPEN_CLIP).to(dtype).eval()
    file.parent.mkdir(parents=True, exist_ok=True)
    if file.suffix == ".safetensors":
        save_file(model.state_dict(), file, metadata={"format": "pt"})
    else:
        wrapped = {f"module.{name}": tensor for name, tensor in model.state_dict().items()}
        torch.save({"epoch": 3, "name": "tiny", "state_dict": wrapped}, file)
    return model


def finetuned(base: Path, target: Path, *, seed: int, scale: float = 1e-2) -> Path:
    """A copy of a folder or a safetensors file whose floating-point weights have moved."""
    generator = torch.Generator().manual_seed(seed)
    if base.is_dir():
        shutil.copytree(base, target)
    else:
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(base, target)
    for file in sorted(target.glob("*.safetensors")) if target.is_dir() else [target]:
        with safe_open(file, framework="pt") as handle:
            metadata = handle.metadata()
        tensors = load_file(file)
        for name in sorted(tensors):
            if tensors[name].is_floating_point():
                noise = torch.randn(tensors[name].shape, generator=generator)
                tensors[name] = (tensors[name].float() + scale * noise).to(tensors[name].dtype)
        part = file.with_suffix(".part")  # the file is mapped still
        save_file(tensors, part, metadata=metadata)
        os.replace(part, file)
    return target


def change_index(folder: Path, entries: dict[str, Any]) -> None:
    """Change in which file a folder's index says that tensors are; None: not listed."""
    index = folder / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    listed = content["weight_map"] | entries
    content["weight_map"] = {name: file for name, file in listed.items() if file is not None}
    index.write_text(json.dumps(content))


def _tokenizer() -> PreTrainedTokenizerFast:
    words = ("<pad>", "<unk>", "</s>", "<image>", *(f"w{i}" for i in range(36)))
    tokenizer = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        unk_token="<unk>",
        eos_token="</s>",
        extra_special_tokens={"image_token": "<image>"},
    )
