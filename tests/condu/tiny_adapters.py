"""Small models with LoRA adapters, and what moves their factors."""

from __future__ import annotations

from typing import Any

import torch
from open_clip.model import CLIP
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM


def clip() -> CLIP:
    torch.manual_seed(0)
    return CLIP(
        embed_dim=16,
        vision_cfg={
            "image_size": 16,
            "patch_size": 8,
            "width": 16,
            "layers": 2,
            "head_width": 8,
        },
        text_cfg={"context_length": 6, "vocab_size": 12, "width": 16, "heads": 2, "layers": 1},
    ).eval()


def llama() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=12,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        tie_word_embeddings=False,
    )
    return LlamaForCausalLM(config).eval()


def gpt2() -> GPT2LMHeadModel:
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=12, n_positions=8, n_embd=16, n_layer=1, n_head=2)
    return GPT2LMHeadModel(config).eval()


class Convolutions(nn.Module):
    """Layers of the remaining kinds that LoRA adapts."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(12, 6)
        self.deep = nn.Conv1d(6, 4, 3)
        self.point = nn.Conv2d(4, 3, 1)
        self.norm = nn.BatchNorm2d(3)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.deep(self.embed(tokens).transpose(1, 2))
        return self.norm(self.point(x[..., None]))


MODELS: dict[str, tuple[Any, dict[str, Any]]] = {
    "clip mlp": (clip, {"r": 4, "target_modules": ["c_fc", "c_proj"], "use_rslora": True}),
    "clip attention": (clip, {"r": 3, "target_modules": ["attn", "c_fc"]}),
    "patterns": (
        llama,
        {
            "r": 2,
            "target_modules": ["q_proj", "v_proj", "down_proj"],
            "rank_pattern": {"v_proj": 3},
            "alpha_pattern": {"down_proj": 5},
        },
    ),
    "fan-in-fan-out": (gpt2, {"r": 2, "target_modules": ["c_attn"], "fan_in_fan_out": True}),
    "convolutions": (Convolutions, {"r": 2, "target_modules": ["embed", "deep", "point"]}),
}


def adapted(kind: str, seed: int = 0, **options: Any) -> PeftModel:
    """A model of MODELS with a fresh adapter; the base weights are the same on every call."""
    make, config = MODELS[kind]
    model = make()
    torch.manual_seed(seed)
    return get_peft_model(model, LoraConfig(**{"lora_alpha": 2, **config, **options}))


def answer(model: nn.Module) -> Tensor:
    """What a model says to a fixed input."""
    tokens = torch.tensor([[1, 2, 3, 4, 5, 11], [3, 1, 4, 1, 5, 11]])
    generator = torch.Generator().manual_seed(1)
    model.eval()
    with torch.no_grad():
        if hasattr(model, "encode_image"):
            images = torch.randn(2, 3, 16, 16, generator=generator)
            return torch.cat([model.encode_image(images), model.encode_text(tokens)])
        out = model(tokens)
        return out if isinstance(out, Tensor) else out.logits


def finetune(model: nn.Module, seed: int) -> None:
    """Move everything that is trainable, and let the model answer once, as training would."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
    answer(model)


def base_weights(model: PeftModel) -> dict[str, Tensor]:
    """Copies of everything but the adapters' tensors, by live name."""
    return {n: t.clone() for n, t in model.state_dict().items() if "lora_" not in n}
