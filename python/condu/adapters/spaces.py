"""The two spaces in which LoRA fine-tunes of a live PEFT model are unified.

*Factors*, as the ConDU paper does: A and B are tensors like any others, θ_0 is their common start,
and their deltas are unified element by element. *Product*: what is unified is the change of each
weight, ΔW = s·B·A, which has a meaning of its own, so the starts need not be alike; an expert is
then the base model with W_0 + d̃ in its weights, and its adapter switched off. This space keeps a
copy of W_0, and absorbing needs room for the ΔW of all adapted weights at once.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import xxhash
from torch import Tensor, nn

from condu.adapters.layers import LoraLayers, check_product, factors_of
from condu.adapters.likeness import check_alike
from condu.live import is_parameter, named_tensors
from condu.spaces import WeightSpace, holds_factors
from condu_ext import UnifiedDelta
from condu_ext.fingerprint import fingerprints
from condu_ext.sharding import mesh_of, refuse_sharded


class FactorSpace(WeightSpace):
    """The state holds what is trainable with the adapter, named as PEFT saves it."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model)
        self.layers = LoraLayers(model)
        self.layers.check_in_use()
        self._adapted = self.layers.weights().keys()

    def check(self) -> None:
        self.layers.check_in_use()
        if changed := self.layers.weights().keys() ^ self._adapted:
            raise RuntimeError(
                f"adapter {self.layers.adapter!r} has come to change other weights than at the"
                f" start: {min(changed)!r}"
            )

    def check_writable(self) -> None:
        self.layers.check_unmerged()

    def named(self) -> dict[str, Tensor]:
        return named_tensors(self.model, self.layers.namer())

    def candidates(self, named: Mapping[str, Tensor]) -> dict[str, Tensor]:
        if not any(named[name].requires_grad for name in self.layers.factors(named)):
            raise ValueError(
                f"adapter {self.layers.adapter!r} has no trainable tensor: load it with"
                " is_trainable=True"
            )
        return super().candidates(named)

    def indispensable(self, named: Mapping[str, Tensor]) -> set[str]:
        return self.layers.factors(named)

    def match(self, state: UnifiedDelta, named: Mapping[str, Tensor]) -> None:
        ours = {name: named[name] for name in self.indispensable(named)}
        theirs = {name: delta for name, delta in state.delta.items() if self._is_adapted(name)}
        check_alike(f"adapter {self.layers.adapter!r}", ours, "the state", theirs)

    def restored(self, named: Mapping[str, Tensor]) -> set[str]:
        return super().restored(named) | self._rewritten()

    def losses(self, changed: Iterable[str]) -> list[str]:
        rewritten = self._rewritten()
        return [name for name in changed if name not in rewritten]

    def frozen_fingerprint(self, base: Mapping[str, Tensor]) -> str:
        name_of = self.layers.namer()
        frozen = {
            name_of(name): parameter
            for name, parameter in self.model.named_parameters(remove_duplicate=False)
            if not name_of.is_adapters(name)
        }
        weights = {name: base.get(name, frozen[name]) for name in sorted(frozen)}
        digits = fingerprints(mesh_of(weights), weights)
        lines = [f"{name} {digits[name]}" for name in weights]
        return xxhash.xxh3_64_hexdigest("\n".join([*lines, *self._scales()]).encode())

    def _scales(self) -> list[str]:
        """The layers' scales: with others, the same factors are another expert."""
        scales = self.layers.scales()
        return [f"{name} {scales[name]!r}" for name in sorted(scales)]

    def _rewritten(self) -> set[str]:
        """Frozen weights that do change: PEFT adds s·B·A to those of an attention before each of
        its calls and takes it away afterwards, which leaves rounding errors behind.
        """
        return set(self.layers.in_attention())

    def _is_adapted(self, name: str) -> bool:
        return holds_factors([name])


class ProductSpace(FactorSpace):
    """The state holds the weights that the adapter changes, named as without adapters."""

    needs_base = False

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model)
        refuse_sharded("the product space", self.named())
        self._shows_expert = False
        adapter = self.layers.adapter
        factors: set[int] = set()
        for name, layer in self.layers:
            check_product(name, layer, adapter)
            pair = factors_of(layer, adapter)
            factors.update(id(factor) for factor in pair)
            if all(factor.any() for factor in pair):
                raise ValueError(
                    f"adapter {adapter!r}, layer {name!r}: B·A is not zero. The product space"
                    " starts from the base model alone: make it before training, with an"
                    " initialisation that sets one factor to zero"
                )
        for name, parameter in model.named_parameters():
            if parameter.requires_grad and id(parameter) not in factors:
                raise ValueError(
                    f"{name!r} is trainable but no factor of adapter {adapter!r}: the product"
                    " space has no place for it (bias, modules_to_save)"
                )
        self._refuse_ties()

    def check(self) -> None:
        if not self._shows_expert:
            super().check()

    def check_writable(self) -> None:
        if not self._shows_expert:
            super().check_writable()

    def candidates(self, named: Mapping[str, Tensor]) -> dict[str, Tensor]:
        buffers = {n: t for n, t in super().candidates(named).items() if not is_parameter(t)}
        return {name: named[name] for name in self.layers.weights()} | buffers

    def indispensable(self, named: Mapping[str, Tensor]) -> set[str]:
        return set(self.layers.weights())

    def finetuned(
        self, live: Mapping[str, Tensor], base: Mapping[str, Tensor]
    ) -> tuple[dict[str, Tensor], Mapping[str, Tensor] | None]:
        deltas = self.layers.deltas()
        return {n: deltas[n] if n in deltas else live[n].detach() for n in base}, None

    def losses(self, changed: Iterable[str]) -> list[str]:
        return [name for name in changed if not holds_factors([name])]

    def show_expert(self) -> None:
        if not self._shows_expert:
            self.layers.enable(False)
            self._shows_expert = True

    def show_base(self) -> None:
        if self._shows_expert:
            self.layers.enable(True)
            self._shows_expert = False

    def _scales(self) -> list[str]:
        return []  # ΔW says it all

    def _is_adapted(self, name: str) -> bool:
        return True

    def _refuse_ties(self) -> None:
        weights = self.layers.weights()
        owners: dict[int, str] = {}
        for name, tensor in self.named().items():
            first = owners.setdefault(tensor.data_ptr(), name)
            if tensor.numel() and first != name and weights.keys() & {first, name}:
                raise ValueError(
                    f"{first!r} and {name!r} are tied: the product space would change both by what"
                    " the adapter does to one"
                )
