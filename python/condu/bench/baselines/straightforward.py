"""What public code does: stack the deltas, sum, sign, one mask a task.

This is the formulation that the speed-ups in the README are against: unify of T delta models with
a bool mask and a rescaler a task, and for one more task the rebuilding of all old deltas followed
by another unify. Tensor by tensor over the model, as the public codes loop over a state dict.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from condu.bench.baselines.base import TAKEOVER, Baseline, Triggered, Weights
from condu.bench.cases import Case


class Straightforward(Baseline):
    """Deltas whole in memory, rebuilt for every new task."""

    def unify(
        self, models: Sequence[Weights], pretrained: Weights, dtype: torch.dtype
    ) -> Triggered:
        deltas = [
            {name: model[name].float() - pretrained[name].float() for name in pretrained}
            for model in models
        ]
        return _unify(deltas, dtype)

    def absorb(self, state: Triggered, finetuned: Weights, pretrained: Weights) -> Triggered:
        new = {name: finetuned[name].float() - pretrained[name].float() for name in pretrained}
        return _unify([*_rebuilt(state), new], _dtype_of(state))

    def merge(self, a: Triggered, b: Triggered) -> Triggered:
        return _unify([*_rebuilt(a), *_rebuilt(b)], _dtype_of(a))

    def decouple_(self, state: Triggered, task: int, pretrained: Weights, out: Weights) -> None:
        delta = _decoupled(state, task)
        expert = {name: pretrained[name] + delta[name] for name in delta}
        for name, tensor in expert.items():  # as load_state_dict does
            out[name].copy_(tensor)

    def extra_bytes(self, case: Case, device: torch.device) -> int:
        n, tasks, u = case.parameters, case.tasks, case.dtypes.state_bytes
        if case.operation == "decouple_":  # masks, expert, delta and a live model to write to
            return n * (tasks + TAKEOVER + 8 + case.dtypes.model_bytes)
        incoming, total = {
            "unify": (0, tasks),
            "merge": (tasks + TAKEOVER, tasks),
        }.get(case.operation, (tasks + TAKEOVER, tasks + 1))
        # all deltas and masks, and of the largest tensor: stacked (twice: the previous tensor's
        # lives on), its magnitudes and their selection
        return n * (incoming + 4 * total + total + u) + 4 * 4 * total * case.largest


def _dtype_of(state: Triggered) -> torch.dtype:
    return next(iter(state.delta.values())).dtype


def _decoupled(state: Triggered, task: int) -> dict[str, Tensor]:
    masks, rescaler = state.masks[task], state.rescalers[task]
    return {name: rescaler * (masks[name] * u.float()) for name, u in state.delta.items()}


def _rebuilt(state: Triggered) -> list[dict[str, Tensor]]:
    return [_decoupled(state, task) for task in range(len(state.masks))]


def _unify(deltas: list[dict[str, Tensor]], dtype: torch.dtype) -> Triggered:
    """Elect a sign, take the extreme value that agrees, mask, rescale."""
    delta: dict[str, Tensor] = {}
    masks: list[dict[str, Tensor]] = [{} for _ in deltas]
    device = next(iter(deltas[0].values())).device
    num, den = torch.zeros(2, len(deltas), dtype=torch.float64, device=device)
    for name in deltas[0]:
        stacked = torch.stack([d[name] for d in deltas])
        sign = torch.sign(stacked.sum(dim=0))
        sign[sign == 0] = -1.0
        agrees = stacked * sign > 0
        extreme = torch.where(agrees, stacked.abs(), 0.0).amax(dim=0)
        delta[name] = (sign * extreme).to(dtype)
        extreme = delta[name].float().abs()
        for t in range(len(deltas)):
            masks[t][name] = agrees[t]
            num[t] += stacked[t].abs().sum(dtype=torch.float64)
            den[t] += (agrees[t] * extreme).sum(dtype=torch.float64)
    norms = num.tolist()  # once: on a GPU each reading waits for all that is queued
    return Triggered(delta, masks, norms, [n / d for n, d in zip(norms, den.tolist(), strict=True)])
