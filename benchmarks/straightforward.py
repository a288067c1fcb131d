"""What public code does in PyTorch: stack the deltas, sum, sign, one mask a task.

This is the formulation that the speed-ups in the README are against: unify of T delta models with
a bool mask and a rescaler a task, and for one more task the rebuilding of all old deltas followed
by another unify. Tensor by tensor over the model, as the public codes loop over a state dict.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

Weights = Mapping[str, Tensor]


@dataclass
class Unified:
    """Unified delta by name; per task the masks by name and a rescaler."""

    delta: dict[str, Tensor]
    masks: list[dict[str, Tensor]]
    rescalers: list[float]


def unify(deltas: list[dict[str, Tensor]]) -> Unified:
    """Elect a sign, take the extreme value that agrees, mask, rescale."""
    delta: dict[str, Tensor] = {}
    masks: list[dict[str, Tensor]] = [{} for _ in deltas]
    num, den = [0.0] * len(deltas), [0.0] * len(deltas)
    for name in deltas[0]:
        stacked = torch.stack([d[name] for d in deltas])
        sign = torch.sign(stacked.sum(dim=0))
        sign[sign == 0] = -1.0
        agrees = stacked * sign > 0
        extreme = torch.where(agrees, stacked.abs(), 0.0).amax(dim=0)
        delta[name] = sign * extreme
        for t in range(len(deltas)):
            masks[t][name] = agrees[t]
            num[t] += stacked[t].abs().sum(dtype=torch.float64).item()
            den[t] += (agrees[t] * extreme).sum(dtype=torch.float64).item()
    return Unified(delta, masks, [n / d for n, d in zip(num, den, strict=True)])


def deltas_of(models: list[Weights], pretrained: Weights) -> list[dict[str, Tensor]]:
    """θ_i − θ_0 of every model."""
    return [{name: model[name] - pretrained[name] for name in pretrained} for model in models]


def decouple(state: Unified, task: int) -> dict[str, Tensor]:
    """λ · (M ⊙ u)."""
    return {
        name: state.rescalers[task] * state.masks[task][name] * u for name, u in state.delta.items()
    }


def absorb(state: Unified, finetuned: Weights, pretrained: Weights) -> Unified:
    """Rebuild every old delta, then unify them with the new one."""
    old = [decouple(state, task) for task in range(len(state.masks))]
    return unify([*old, *deltas_of([finetuned], pretrained)])
