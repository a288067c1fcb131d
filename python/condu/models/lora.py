"""Low-rank adapters (LoRA, arXiv 2106.09685) on any module, through PEFT."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora.layer import MultiheadAttention as LoraAttention
from torch import nn
from transformers.pytorch_utils import Conv1D

# what PEFT has LoRA layers for; it finds others only when some layers are replaced already
_KINDS = (
    nn.Linear,
    nn.Embedding,
    nn.Conv1d,
    nn.Conv2d,
    nn.Conv3d,
    nn.MultiheadAttention,
    Conv1D,
)
# Modules that hand the weights of their linear layers to F.multi_head_attention_forward: a LoRA
# layer put in a child's place is never called, so its factors would get no gradient. The second,
# the attention pool of CLIP's ResNets, goes by its name: open_clip and OpenAI's CLIP have one each.
_READS_WEIGHTS_OF_ITS_CHILDREN = ("MultiheadAttention", "AttentionPool2d")


def add_lora(
    model: nn.Module,
    *,
    rank: int,
    targets: Sequence[str] = ("c_fc", "c_proj"),
    seed: int = 0,
) -> PeftModel:
    """Freeze a model and add trainable factors A [rank, in] and B [out, rank] to its layers.

    A layer W then answers as W + B·A / √rank (ConDU's scale). B starts at zero, so the model
    answers as before; A starts at random, decided by ``seed`` alone: torch's generators stay as
    they are. The model is changed in place; its parameters keep their memory, without gradient.
    PEFT releases without huggingface/peft#3774 add B·A twice in an attention's output projection,
    in training as in merging.

    Args:
        targets: last parts of the dotted names of the layers, in every tower: linear, embedding and
            convolution layers, or a whole ``nn.MultiheadAttention`` ("attn" in open_clip), whose
            input and output projections then get factors of their own.

    Raises:
        ValueError: rank < 1; a target that matches no module, one of another kind, or a layer
            whose weights its parent reads without calling it, so that factors there would never be
            trained; a model that carries adapters already. The model is as it was.
        TypeError: ``targets`` is a string.
    """
    if isinstance(targets, str):
        raise TypeError(f"targets must be a list of names, got the string {targets!r}")
    if rank < 1:
        raise ValueError(f"rank must be at least 1, got {rank}")
    if hasattr(model, "peft_config"):
        raise ValueError("the model carries adapters already")
    if not targets:
        raise ValueError("targets is empty: there is no layer to adapt")
    for target in targets:
        matched = list(_matched(model, target))
        if not matched:
            raise ValueError(f"target {target!r} matches no module of the model")
        for name in matched:
            if not isinstance(layer := model.get_submodule(name), _KINDS):
                raise ValueError(
                    f"target {target!r} matches {name!r}, a {type(layer).__name__}, for which there"
                    " is no LoRA"
                )
            _refuse_uncalled(model, target, name)
    config = LoraConfig(r=rank, lora_alpha=1, use_rslora=True, target_modules=list(targets))
    # PEFT draws on the CPU, whatever the model's device
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        adapted = get_peft_model(model, config)
    assert isinstance(adapted, PeftModel)  # a PeftMixedModel only with mixed=True
    return adapted


def rewritten_weights(model: nn.Module) -> set[str]:
    """Names of frozen weights that do change: PEFT adds B·A to those of an attention before each of
    its calls and takes it away afterwards, which leaves rounding errors behind."""
    return {
        f"{name}.{weight}"
        for name, module in model.named_modules()
        if isinstance(module, LoraAttention)
        for weight, parameter in module.named_parameters()
        if not parameter.requires_grad
    }


def _matched(model: nn.Module, target: str) -> Iterator[str]:
    """Names of the modules that PEFT adapts for a target."""
    for name, _ in model.named_modules():
        if name and (name == target or name.endswith(f".{target}")):
            yield name


def _refuse_uncalled(model: nn.Module, target: str, name: str) -> None:
    parent_name = name.rpartition(".")[0]
    parent = model.get_submodule(parent_name)
    kinds = {kind.__name__ for kind in type(parent).__mro__}
    if kinds.isdisjoint(_READS_WEIGHTS_OF_ITS_CHILDREN):
        return
    if isinstance(parent, nn.MultiheadAttention):
        instead = f"target {parent_name.rpartition('.')[2]!r}, the whole attention, instead"
    else:
        instead = f"leave it out, by a longer target such as 'mlp.{target}'"
    raise ValueError(
        f"target {target!r} matches {name!r}, whose weights the {type(parent).__name__} around it"
        f" reads without calling it: factors there would never be trained; {instead}"
    )
