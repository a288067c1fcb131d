"""The space in which a live model's tasks are unified: what the state is made of.

A plain model's state holds its trainable weights. A model with LoRA adapters is unified over its
factors, or over the weight changes that their products are (:mod:`condu.adapters.spaces`).
"""

from __future__ import annotations

import sys
from collections.abc import Collection, Iterable, Mapping
from typing import Literal

from torch import Tensor, nn

from condu.live import changeable, named_tensors
from condu_ext import UnifiedDelta

AdapterSpace = Literal["factors", "product"]


def space_of(model: nn.Module, adapters: AdapterSpace) -> WeightSpace:
    """The space of a model: ``adapters`` if it carries adapters of PEFT, its weights otherwise.

    Raises:
        ValueError: an unknown space, or adapters that cannot be fused in it.
        RuntimeError: the adapters are merged, disabled, or several are active.
        TypeError: the weights under the adapters are sharded, in the product space.
    """
    if adapters not in ("factors", "product"):
        raise ValueError(f"space must be 'factors' or 'product', got {adapters!r}")
    if "peft" in sys.modules:  # otherwise nothing in the model can be PEFT's
        from condu.adapters.layers import has_adapters
        from condu.adapters.spaces import FactorSpace, ProductSpace

        if has_adapters(model):
            return ProductSpace(model) if adapters == "product" else FactorSpace(model)
    return WeightSpace(model)


def holds_factors(names: Collection[str]) -> bool:
    """Whether a state with tensors of these names is one of the space of LoRA factors."""
    return any(segment.startswith("lora_") for name in names for segment in name.split("."))


class WeightSpace:
    """The state holds the model's trainable weights, by canonical name."""

    needs_base = True
    """Whether a state says anything only together with the base model that it was made over."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model

    def check(self) -> None:
        """Raises RuntimeError if the live weights do not mean now what the state holds."""

    def check_writable(self) -> None:
        """Raises RuntimeError if the live weights hold more than can be written over."""

    def named(self) -> dict[str, Tensor]:
        """Every live parameter and persistent buffer, by its name in the state."""
        return named_tensors(self.model)

    def candidates(self, named: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """What can belong to the state: trainable floating-point parameters, and buffers."""
        return {n: t for n, t in changeable(named).items() if t.is_floating_point()}

    def indispensable(self, named: Mapping[str, Tensor]) -> set[str]:
        """Names of what no pattern may leave out of the state."""
        return set()

    def match(self, state: UnifiedDelta, named: Mapping[str, Tensor]) -> None:
        """Raises ValueError if a state is one of other adapters than the model's."""
        if holds_factors(state.spec.names) and named.keys().isdisjoint(state.spec.names):
            raise ValueError("the state holds LoRA factors, but the model carries no adapter")

    def restored(self, named: Mapping[str, Tensor]) -> set[str]:
        """Names of what must go back to θ_0 beside the tensors of the state."""
        return set(changeable(named))

    def finetuned(
        self, live: Mapping[str, Tensor], base: Mapping[str, Tensor]
    ) -> tuple[dict[str, Tensor], Mapping[str, Tensor] | None]:
        """What ``condu_ext.absorb`` takes for the tensors of the state: a model and its θ_0."""
        return {name: live[name].detach() for name in base}, base

    def losses(self, changed: Iterable[str]) -> list[str]:
        """Which of the changed tensors outside the state lose their training at θ_0."""
        return list(changed)

    def show_expert(self) -> None:
        """Called when an expert's weights have been written."""

    def show_base(self) -> None:
        """Called when θ_0 has been written."""

    def frozen_fingerprint(self, base: Mapping[str, Tensor]) -> str | None:
        """Digits that recognise the weights under the adapters; ``base`` overrides live ones.
        Collective if they are sharded."""
        return None
