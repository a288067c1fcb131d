"""Experts of an ablated fusion in a live model."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from condu.ablation.fusing import AblatedDelta, Fusing
from condu.fusion import ConDU
from condu.weights import put_weights


class AblatedExperts:
    """Answers for `condu.evaluation.Evaluator` as a `ConDU` of the same model would, but fuses as
    `fusing` says. `fusion`, which holds no task, knows θ_0, what is fused of the model and what is
    kept whole for each task (BatchNorm statistics), and puts θ_0 back."""

    def __init__(self, fusion: ConDU, fusing: Fusing, *, seed: int) -> None:
        self._fusion = fusion
        fused = [entry.name for entry in fusion.state.spec.tensors]  # tied ones once
        self._base = {name: fusion.pretrained[name] for name in fused}
        self._private: list[dict[str, Tensor]] = []
        self._tasks: list[str] = []
        self._active: str | None = None
        self.unified = AblatedDelta(fusing, self._base, dtype=fusion.state.dtype, seed=seed)

    @property
    def tasks(self) -> tuple[str, ...]:
        return tuple(self._tasks)

    @property
    def active(self) -> str | None:
        return self._active

    def absorb(self, task: str, finetuned: Mapping[str, Tensor]) -> None:
        """Take a fine-tuned model, by tensor name on any device, as the task's. ValueError naming
        the task and the tensor for values that are not finite."""
        delta = {
            name: finetuned[name].to(base.device).float() - base.float()
            for name, base in self._base.items()
        }
        for name, values in delta.items():
            if not bool(torch.isfinite(values).all()):
                raise ValueError(
                    f"task {task!r}, tensor {name!r}: its model has NaN or infinite values"
                )
        self.unified.absorb(delta)
        private = self._fusion.state.spec.private_names
        self._private.append({name: finetuned[name] for name in private})
        self._tasks.append(task)

    def activate(self, task: str) -> None:
        self.reset()
        number = self._tasks.index(task)
        weights = {
            name: self._base[name].float() + delta
            for name, delta in self.unified.decouple(number).items()
        }
        with torch.no_grad():
            put_weights(self._fusion.model, {**weights, **self._private[number]})
        self._active = task

    def reset(self) -> None:
        self._fusion.reset()
        self._active = None
