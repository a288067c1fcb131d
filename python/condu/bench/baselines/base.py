"""What a baseline is, and the form in which its states are compared."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import condu_ext as cx
from condu.bench.cases import Case

Weights = Mapping[str, Tensor]
TAKEOVER = 8
"""Bytes a parameter that converting an incoming state took beside its result, as measured: a mask
and its sum by name, and gaps that the allocator leaves between tensors of all sizes."""


@dataclass
class Triggered:
    """A unified delta by tensor name; for each task bool masks by name and λ = norm / Σ M·|u|.

    A task's norm, the sum of its delta's magnitudes, never changes after it joined.
    """

    delta: dict[str, Tensor]
    masks: list[dict[str, Tensor]]
    norms: list[float]
    rescalers: list[float]


class Baseline(ABC):
    """The operations, named as in :mod:`condu_ext`, on states in a form of the baseline's own."""

    compiles = False
    """Whether the first call also compiles: it is not timed then, and experts may be rounded once
    where the rule rounds twice."""

    def reset(self) -> None:  # noqa: B027 (most baselines keep nothing)
        """Forget what was kept for another case."""

    def state_of(self, state: cx.UnifiedDelta) -> Any:
        """The same state in the baseline's form; may share the memory of the unified delta."""
        masks = [state.mask(task) for task in state.tasks]
        return Triggered(state.delta, masks, *norms_and_rescalers(state, masks))

    def named(self, state: Any) -> Triggered:
        """A state of the baseline's own in the form in which results are compared."""
        assert isinstance(state, Triggered)
        return state

    @abstractmethod
    def unify(self, models: Sequence[Weights], pretrained: Weights, dtype: torch.dtype) -> Any:
        """A state of float32 or bfloat16 from T models."""

    @abstractmethod
    def absorb(self, state: Any, finetuned: Weights, pretrained: Weights) -> Any:
        """A new state with one more task."""

    @abstractmethod
    def merge(self, a: Any, b: Any) -> Any:
        """A new state with the tasks of a, then those of b."""

    @abstractmethod
    def decouple_(self, state: Any, task: int, pretrained: Weights, out: Weights) -> None:
        """Write θ_0 + λ·M⊙u into ``out``."""

    @abstractmethod
    def extra_bytes(self, case: Case, device: torch.device) -> int:
        """Estimate of the memory at the highest point above our inputs and our result: the
        incoming state in the baseline's form and what the operation itself takes."""


def norms_and_rescalers(
    state: cx.UnifiedDelta, masks: Sequence[Mapping[str, Tensor]]
) -> tuple[list[float], list[float]]:
    """Σ|d| and λ of every task; the first from the second, for a state does not show its sums."""
    delta, rescalers = state.delta, [rescaler_of(state, task) for task in state.tasks]
    norms = []
    for mask, rescaler in zip(masks, rescalers, strict=True):
        held = (float((u.float().abs() * mask[n]).sum()) for n, u in delta.items())
        norms.append(rescaler * sum(held))
    return norms, rescalers


def rescaler_of(state: cx.UnifiedDelta, task: str) -> float:
    """λ of a task of a state whose rule is global."""
    value = state.rescaler(task)
    assert isinstance(value, float)
    return value
