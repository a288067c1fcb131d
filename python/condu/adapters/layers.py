"""The LoRA layers of a live PEFT model, and the weight changes that they make."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache

import torch
from peft import LoraConfig
from peft.tuners.lora.layer import Conv1d, Conv2d, Conv3d, Embedding, Linear, LoraLayer
from peft.tuners.lora.layer import MultiheadAttention as LoraAttention
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from condu.adapters.names import StateNames

# the kinds whose get_delta_weight is the whole change that the layer makes
_PRODUCTS = (Conv1d, Conv2d, Conv3d, Embedding, Linear, LoraAttention)


@dataclass(frozen=True)
class Product:
    """A weight change s·B·A as its factors, fp32: ``a`` [rank, columns], ``b`` [rows, rank]."""

    a: Tensor
    b: Tensor
    scale: float

    @property
    def shape(self) -> tuple[int, int]:
        return self.b.shape[0], self.a.shape[1]

    def rows(self, start: int, stop: int) -> Tensor:
        """Rows [start, stop) of the change."""
        # a copy, for its place in memory is always aligned alike: that may decide the last bits
        return (self.b[start:stop].clone() @ self.a).mul_(self.scale)


def has_adapters(model: nn.Module) -> bool:
    """Whether a module, or one inside it, carries adapters of PEFT."""
    return any(isinstance(module, BaseTunerLayer) for module in model.modules())


class LoraLayers:
    """The layers of the one active LoRA adapter of a model; looked up anew on each call.

    Raises:
        ValueError: an adapter of another kind, or a LoRA variant such as DoRA.
        RuntimeError: no adapter is active, or several are.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        active = {name for _, layer in self._all() for name in layer.active_adapters}
        if len(active) != 1:
            found = " and ".join(map(repr, sorted(active))) or "none"
            raise RuntimeError(
                f"exactly one adapter must be active, but {found} is: call set_adapter() with one"
            )
        (self.adapter,) = active
        for name, layer in self._all():
            where = f"adapter {self.adapter!r}, layer {name!r}"
            if not isinstance(layer, LoraLayer):
                raise ValueError(
                    f"{where}: is of type {type(layer).__name__}, but only LoRA can be fused"
                )
            if variant := layer.lora_variant.get(self.adapter):
                kind = type(variant).__name__
                raise ValueError(
                    f"{where}: {'DoRA' if kind.startswith('Dora') else kind} changes the weight by"
                    " more than the product of its factors, so it cannot be fused"
                )

    def __iter__(self) -> Iterator[tuple[str, LoraLayer]]:
        """Live name and layer, of those that the adapter has factors for."""
        for name, layer in self._all():
            if isinstance(layer, LoraLayer) and self.adapter in layer.r:
                yield name, layer

    def check_in_use(self) -> None:
        """Raises RuntimeError unless the adapter alone acts on the model, through its factors."""
        self.check_unmerged()
        for _, layer in self._all():
            if list(layer.active_adapters) != [self.adapter]:
                found = " and ".join(map(repr, layer.active_adapters)) or "none"
                raise RuntimeError(
                    f"adapter {self.adapter!r} must be the active one, but {found} is:"
                    f" call set_adapter({self.adapter!r})"
                )
            if layer.disable_adapters:
                raise RuntimeError(
                    f"adapter {self.adapter!r} is disabled: call enable_adapter_layers()"
                )

    def check_unmerged(self) -> None:
        """Raises RuntimeError if an adapter is merged into the weights under it."""
        for name, layer in self._all():
            if layer.merged:
                raise RuntimeError(
                    f"adapter {' and '.join(map(repr, layer.merged_adapters))} is merged into the"
                    f" weights of layer {name!r}: call unmerge_adapter()"
                )

    def weights(self) -> dict[str, LoraLayer]:
        """The layers by state name of the weight that each of them changes."""
        name_of = self.namer()
        return {
            name_of(
                f"{name}.base_layer.in_proj_weight"
                if isinstance(layer, LoraAttention)
                else f"{name}.base_layer.weight"
            ): layer
            for name, layer in self
        }

    def in_attention(self) -> dict[str, LoraLayer]:
        """Those of ``weights`` that are of an attention: its input and output projections."""
        weights = self.weights()
        attentions = [layer for layer in weights.values() if isinstance(layer, LoraAttention)]
        outputs = {id(layer.base_layer.out_proj) for layer in attentions}
        return {
            name: layer
            for name, layer in weights.items()
            if isinstance(layer, LoraAttention) or id(layer) in outputs
        }

    def deltas(self) -> dict[str, Tensor]:
        """What the adapter adds to each weight, fp32, in the weight's shape."""
        in_attention = self.in_attention()
        found = {}
        for name, layer in self.weights().items():
            found[name] = _delta_weight(layer, self.adapter)
            if name in in_attention and not isinstance(layer, LoraAttention):
                found[name] *= output_projection_count()
        return found

    def products(self) -> dict[str, Product]:
        """``deltas`` as products of factors, for linear layers and attentions."""
        in_attention = self.in_attention()
        found = {}
        for name, layer in self.weights().items():
            a, b = (factor.detach().float() for factor in factors_of(layer, self.adapter))
            twice = name in in_attention and not isinstance(layer, LoraAttention)
            count = output_projection_count() if twice else 1
            found[name] = Product(a, b, layer.scaling[self.adapter] * count)
        return found

    def scales(self) -> dict[str, float]:
        """Scale s of each weight's change s·B·A."""
        return {name: layer.scaling[self.adapter] for name, layer in self.weights().items()}

    def factors(self, named: Mapping[str, Tensor]) -> set[str]:
        """Which of the named tensors are the adapter's factors."""
        ids = {id(factor) for _, layer in self for factor in factors_of(layer, self.adapter)}
        return {name for name, tensor in named.items() if id(tensor) in ids}

    def enable(self, enabled: bool) -> None:
        """Switch the adapter on or off; what requires grad stays as it is."""
        flags = [(p, p.requires_grad) for p in self._model.parameters()]
        for _, layer in self._all():
            layer.enable_adapters(enabled)
        for parameter, flag in flags:
            parameter.requires_grad_(flag)

    def namer(self) -> StateNames:
        """What gives live tensors their names in the state."""
        return StateNames(self._model, self.adapter)

    def _all(self) -> Iterator[tuple[str, BaseTunerLayer]]:
        for name, module in self._model.named_modules():
            if isinstance(module, BaseTunerLayer):
                yield name, module


def factors_of(layer: LoraLayer, adapter: str) -> list[Tensor]:
    """The two factors of a layer: A then B."""
    if isinstance(layer, Embedding):
        return [layer.lora_embedding_A[adapter], layer.lora_embedding_B[adapter]]
    return [factors.get_parameter(f"{adapter}.weight") for factors in (layer.lora_A, layer.lora_B)]


def check_product(name: str, layer: LoraLayer, adapter: str) -> None:
    """Raises ValueError unless the change that a layer makes is its ``get_delta_weight``."""
    where = f"adapter {adapter!r}, layer {name!r}"
    if type(layer) not in _PRODUCTS:
        raise ValueError(
            f"{where}: the product space has no rule for layers of type {type(layer).__name__}"
            f" (over {type(layer.get_base_layer()).__name__})"
        )
    if layer.lora_bias[adapter]:
        raise ValueError(f"{where}: has lora_bias, which is no product of factors")


@torch.no_grad()
def _delta_weight(layer: LoraLayer, adapter: str) -> Tensor:
    """A layer's weight change s·B·A in the shape of its weight, computed in fp32 by PEFT."""
    with _in_fp32(factors_of(layer, adapter)):
        delta: Tensor = layer.get_delta_weight(adapter)  # type: ignore[attr-defined]
        return delta.detach()


@contextmanager
def _in_fp32(parameters: list[Tensor]) -> Iterator[None]:
    """Narrower parameters in fp32 meanwhile: PEFT rounds the product to their dtype."""
    narrow = [(p, p.data) for p in parameters if p.dtype != torch.float32]
    try:
        for parameter, values in narrow:
            parameter.data = values.float()
        yield
    finally:
        for parameter, values in narrow:
            parameter.data = values


@cache
def output_projection_count() -> int:
    """How often PEFT adds the change of an attention's output projection to its weight.

    Once would be right, but releases without huggingface/peft#3774 add it twice, while training,
    answering and merging alike. So it is asked of the PEFT that is installed.
    """
    with torch.device("cpu"), torch.random.fork_rng(devices=[]):
        config = LoraConfig(r=1, lora_alpha=1)
        layer = LoraAttention(
            nn.MultiheadAttention(1, 1), "probe", r=1, lora_alpha=1, config=config
        )
    projection = layer.get_submodule("base_layer.out_proj")
    assert isinstance(projection, LoraLayer)
    base = projection.get_base_layer()
    for weight in (*factors_of(projection, "probe"), base.get_parameter("weight")):
        weight.data.fill_(1.0)
    layer.merge(adapter_names=["probe"])
    return round(base.weight.item() - 1)  # type: ignore[operator]
