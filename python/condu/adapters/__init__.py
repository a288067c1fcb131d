"""LoRA adapters in the unified model: of live PEFT models, and in folders that PEFT saves."""

from __future__ import annotations

from condu.adapters.absorb import absorb_adapter
from condu.adapters.extract import EnergyLoss, extract_adapter

__all__ = ["EnergyLoss", "absorb_adapter", "extract_adapter"]
