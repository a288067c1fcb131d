"""Adapters in folders that PEFT saved: ``adapter_config.json``, ``adapter_model.safetensors``.

No base model is needed. What the adapter adds to each weight is asked of PEFT itself, which is
given layers of the right kinds and sizes, without weights, to put the saved factors on.
"""

from __future__ import annotations

import dataclasses
import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from peft import LoraConfig, PeftConfig, get_peft_model
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from condu.adapters.layers import LoraLayers, Product
from condu.adapters.names import PREFIX

CONFIG = "adapter_config.json"
TENSORS = "adapter_model.safetensors"
OUTPUT_PROJECTION = ".base_layer.out_proj"
"""What PEFT appends to an attention's name for the factors of its output projection."""
_PICKLE = "adapter_model.bin"
_FACTOR = re.compile(
    re.escape(PREFIX) + r"(?P<layer>.+)\.lora_(?P<embedding>embedding_)?(?P<which>[AB])(\.weight)?"
)
# PEFT's names; all others take the start's B·A out of the base weights, which the folder lacks
_KEEP_THE_BASE = (True, False, "gaussian", "eva", "orthogonal")


@dataclass(frozen=True)
class AdapterFolder:
    """A saved LoRA adapter.

    tensors: by the names in its file.
    """

    path: Path
    config: LoraConfig
    tensors: Mapping[str, Tensor]

    @classmethod
    def read(cls, path: str | os.PathLike[str]) -> AdapterFolder:
        """Read a folder.

        Raises:
            FileNotFoundError: it holds no adapter.
            ValueError: one that is pickled, of another kind than LoRA, damaged or empty, or that
                adapts parameters without a layer of their own (``target_parameters``).
        """
        folder = Path(path)
        if not (folder / CONFIG).is_file():
            raise FileNotFoundError(f"{folder} holds no adapter ({CONFIG})")
        if not (folder / TENSORS).is_file():
            if (folder / _PICKLE).exists():
                raise ValueError(
                    f"{folder / _PICKLE} is a pickle, which can run anything when it is read:"
                    f" save the adapter as {TENSORS}"
                )
            raise FileNotFoundError(f"{folder} holds no adapter ({TENSORS})")
        try:
            config = PeftConfig.from_pretrained(str(folder))
        except (ValueError, TypeError, KeyError) as error:
            raise ValueError(f"{folder / CONFIG}: {error}") from None
        if type(config) is not LoraConfig:
            kind = getattr(config.peft_type, "value", config.peft_type)
            raise ValueError(f"{folder / CONFIG}: is of type {kind}, but only LoRA can be fused")
        for field in dataclasses.fields(config):
            if field.metadata.get("is_lora_variant") and getattr(config, field.name):
                raise ValueError(
                    f"{folder / CONFIG}: {field.name} (DoRA and its like) changes the weights by"
                    " more than the product of factors, so it cannot be fused"
                )
        if config.target_parameters:
            raise ValueError(
                f"{folder / CONFIG}: target_parameters={config.target_parameters!r} adapts"
                " parameters that are no layer's weight, so it cannot be fused"
            )
        try:
            tensors = load_file(folder / TENSORS)
        except SafetensorError as error:
            raise ValueError(f"{folder / TENSORS}: {error}") from None
        if not tensors:
            raise ValueError(f"{folder / TENSORS} holds no tensor")
        for name, tensor in tensors.items():
            if not tensor.is_floating_point():
                raise ValueError(
                    f"{folder / TENSORS}: tensor {name!r} is {tensor.dtype}, a factor is floating"
                    " point"
                )
        return cls(folder, config, tensors)

    def deltas(self) -> dict[str, Tensor]:
        """What the adapter adds to each weight: s·B·A, fp32, by the weight's name in the model
        without adapters.

        Raises:
            ValueError: an adapter that changes more than that, or whose start did; or layers whose
                weights a state of products would take for those of linear ones, transposed:
                embeddings, and transformers' Conv1D.
        """
        self._check_products()
        return self._layers.deltas()

    def products(self) -> dict[str, Product]:
        """``deltas`` as products of factors. Raises ValueError as that does."""
        self._check_products()
        return self._layers.products()

    def scales(self) -> dict[str, float]:
        """Scale s of each adapted weight."""
        return self._layers.scales()

    def _check_products(self) -> None:
        if self.config.init_lora_weights not in _KEEP_THE_BASE:
            raise ValueError(
                f"{self.path / CONFIG}: init_lora_weights={self.config.init_lora_weights!r} changes"
                " the base weights when the adapter is made, and the folder does not hold them"
            )
        for layer, pair in self._factors().items():
            if "embedding" in pair or self.config.fan_in_fan_out:
                kind = "an embedding" if "embedding" in pair else "a Conv1D (fan_in_fan_out)"
                raise ValueError(
                    f"{self.path}: layer {layer!r} is {kind}, whose weight is transposed; a state"
                    " of products does not know that. Absorb it with init, or from the live model"
                )

    @cached_property
    def _layers(self) -> LoraLayers:
        config = self.config
        model, targets = self._bare_model()
        with torch.device("meta"):
            adapted = get_peft_model(
                model,
                LoraConfig(
                    r=config.r,
                    lora_alpha=config.lora_alpha,
                    use_rslora=config.use_rslora,
                    rank_pattern=config.rank_pattern,
                    alpha_pattern=config.alpha_pattern,
                    fan_in_fan_out=config.fan_in_fan_out,
                    target_modules=exactly(targets),
                ),
            )
        layers = LoraLayers(adapted)
        state_name = layers.namer()
        places = {
            state_name(name): (name, tensor.shape)
            for name, tensor in adapted.named_parameters()
            if state_name.is_adapters(name)
        }
        for name, tensor in self.tensors.items():
            if places[name][1] != tensor.shape:
                raise ValueError(
                    f"{self.path / TENSORS}: tensor {name!r} has shape {tuple(tensor.shape)}, by"
                    f" {CONFIG} it is {tuple(places[name][1])}"
                )
        found = {places[name][0]: tensor for name, tensor in self.tensors.items()}
        adapted.load_state_dict(found, strict=False, assign=True)
        return layers

    def _bare_model(self) -> tuple[nn.Module, list[str]]:
        """A model of the adapted layers alone, on the meta device, and their names."""
        factors = self._factors()
        inputs = {layer: pair["A"].shape[1] for layer, pair in factors.items()}
        outputs = {layer: pair["B"].shape[0] for layer, pair in factors.items()}
        root = nn.Module()
        layers = [layer for layer in factors if not layer.endswith(OUTPUT_PROJECTION)]
        with torch.device("meta"):
            for layer in layers:
                size = inputs[layer], outputs[layer]
                module: nn.Module
                if layer + OUTPUT_PROJECTION in factors:
                    module = nn.MultiheadAttention(inputs[layer], 1)
                elif "embedding" in factors[layer]:
                    module = nn.Embedding(*size)
                elif self.config.fan_in_fan_out:
                    module = Conv1D(size[1], size[0])
                else:
                    module = nn.Linear(*size)
                _put(root, layer, module)
        return root, layers

    def _factors(self) -> dict[str, dict[str, Tensor]]:
        """The factors A and B of each layer; "embedding" too, if the layer is one."""
        factors: dict[str, dict[str, Tensor]] = {}
        for name, tensor in self.tensors.items():
            match = _FACTOR.fullmatch(name)
            where = f"{self.path / TENSORS}: tensor {name!r}"
            if not match:
                raise ValueError(f"{where} is no factor of a layer (modules_to_save, bias)")
            if tensor.dim() != 2:
                raise ValueError(
                    f"{where} has {tensor.dim()} dimensions: what factors of a convolution do"
                    " depends on its layer; absorb it from the live model"
                )
            pair = factors.setdefault(match["layer"], {})
            pair[match["which"]] = tensor
            if match["embedding"]:
                pair["embedding"] = tensor
        for layer, pair in factors.items():
            if not {"A", "B"} <= pair.keys():
                raise ValueError(
                    f"{self.path / TENSORS}: layer {layer!r} has factor {' '.join(pair)} only"
                )
        return factors


def exactly(layers: Iterable[str]) -> str:
    """The target_modules that mean these layers alone, in a list they would match by their ends."""
    return "|".join(map(re.escape, layers))


def _put(root: nn.Module, path: str, module: nn.Module) -> None:
    """Put a module into a tree of empty ones."""
    *parents, last = path.split(".")
    for name in parents:
        if name not in root._modules:
            root.add_module(name, nn.Module())
        root = root.get_submodule(name)
    root.add_module(last, module)
