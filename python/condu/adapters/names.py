"""Names of a live PEFT model's tensors that hold on disk, and in the model without adapters."""

from __future__ import annotations

from peft import PeftModel
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from peft.utils import AuxiliaryTrainingWrapper
from torch import nn

from condu.live import canonical_name

PREFIX = "base_model.model."
"""What the names of an adapter's tensors on disk begin with."""


class StateNames:
    """Names of live tensors in the state: what belongs to the adapter is named as PEFT saves it,
    and everything else as in the model without adapters.
    """

    def __init__(self, model: nn.Module, adapter: str) -> None:
        self._adapter = adapter
        kinds = (PeftModel, BaseTuner, BaseTunerLayer, AuxiliaryTrainingWrapper)
        self._owners = {
            name: module
            for name, module in model.named_modules(remove_duplicate=False)
            if isinstance(module, kinds)
        }
        self._wrapped = any(isinstance(owner, PeftModel) for owner in self._owners.values())

    def __call__(self, name: str) -> str:
        if saved := self._saved_by_peft(name):
            # transformers' own add_adapter makes no PeftModel, but saves as if there were one
            return canonical_name(saved) if self._wrapped else PREFIX + canonical_name(saved)
        return canonical_name(self._without_adapters(name))

    def is_adapters(self, name: str) -> bool:
        """Whether a live tensor belongs to an adapter, this or another one."""
        return self._saved_by_peft(name) is not None

    def _saved_by_peft(self, name: str) -> str | None:
        segments = name.split(".")
        for position, segment in enumerate(segments[:-1]):
            owner = self._owners.get(".".join(segments[:position]))
            whole = isinstance(owner, AuxiliaryTrainingWrapper) and segment == "modules_to_save"
            if whole or (
                isinstance(owner, BaseTunerLayer) and segment in owner.adapter_layer_names
            ):
                if segments[position + 1] != self._adapter:
                    return name
                return ".".join(segments[: position + (not whole)] + segments[position + 2 :])
        return None

    def _without_adapters(self, name: str) -> str:
        segments = name.split(".")
        kept = []
        for position, segment in enumerate(segments):
            owner = self._owners.get(".".join(segments[:position]))
            if not (
                (segment == "base_layer" and isinstance(owner, BaseTunerLayer))
                or (segment == "base_model" and isinstance(owner, PeftModel))
                or (segment == "model" and isinstance(owner, BaseTuner))
            ):
                kept.append(segment)
        return ".".join(kept)
