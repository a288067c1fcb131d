"""How near a task's decoupled delta d̃ = λ·M⊙u comes to the delta model d that was unified.

Beside accuracy, which need not follow: of many tasks that have nothing to do with each other, d̃ may
be as far from d as 0 is while every expert still answers well.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

from condu.live import canonical_name
from condu_ext import UnifiedDelta
from condu_ext.reference import unpack_bits


@dataclass(frozen=True)
class Reconstruction:
    """One task in a unified model: its rescaler λ (the median over tensors where each has its own),
    the share of its mask's bits that are set, ‖d̃ − d‖₂ / ‖d‖₂ and the cosine of d̃ and d.

    What has no value is None: both numbers of a task that did not move, the cosine of one whose
    rescaler is 0.
    """

    rescaler: float
    density: float
    relative_l2: float | None
    cosine: float | None


@dataclass(frozen=True)
class Fused:
    """A unified model: bytes in memory, and its tasks in order."""

    bytes: int
    tasks: dict[str, Reconstruction]


def reconstruct(
    state: UnifiedDelta,
    task: str,
    pretrained: Mapping[str, Tensor],
    finetuned: Path,
    name_of: Callable[[str], str] = canonical_name,
) -> Reconstruction:
    """Compare d̃ with d = θ − θ_0 over all fused tensors, tied ones once; private ones are no part
    of either. Both as they are defined, in float32; sums in float64.

    Reads one tensor at a time from the safetensors file `finetuned`, whose names `name_of` turns
    into those of the state; works where the state is. Raises KeyError for an unknown task and for
    a tensor that the file lacks, ValueError for one of another shape.
    """
    names = [entry.name for entry in state.spec.tensors]
    bits, delta = state.packed_mask(task), state.delta
    found = state.rescaler(task)
    rescalers = dict.fromkeys(names, found) if isinstance(found, float) else found
    chosen, sums = 0, torch.zeros(4, dtype=torch.float64)
    with safe_open(finetuned, framework="pt") as file:
        keys = {name_of(key): key for key in file.keys()}  # noqa: SIM118, not a dict
        for entry in state.spec.tensors:
            name = entry.name
            if name not in keys:
                raise KeyError(f"{finetuned}, task {task!r}: has no tensor {name!r}")
            theta = file.get_tensor(keys[name])
            if tuple(theta.shape) != entry.shape:
                raise ValueError(
                    f"{finetuned}, task {task!r}, tensor {name!r}: has the shape "
                    f"{tuple(theta.shape)}, that of the state is {entry.shape}"
                )
            u = delta[name]
            base = pretrained[name].to(u.device, torch.float32)
            moved = (theta.to(u.device, torch.float32) - base).ravel()
            mask = unpack_bits(bits[name], entry.numel)
            rebuilt = torch.where(mask, rescalers[name] * u.float().ravel(), 0.0)
            chosen += int(mask.sum())
            sums += _sums(moved.double(), rebuilt.double())
    total = sum(entry.numel for entry in state.spec.tensors)
    error, own, other, inner = (float(value) for value in sums)
    return Reconstruction(
        rescaler=statistics.median(rescalers[name] for name in names),
        density=chosen / total,
        relative_l2=math.sqrt(error / own) if own else None,
        cosine=min(1.0, inner / math.sqrt(own) / math.sqrt(other)) if own and other else None,
    )


def _sums(d: Tensor, rebuilt: Tensor) -> Tensor:
    """‖d̃ − d‖², ‖d‖², ‖d̃‖² and ⟨d̃, d⟩ of one tensor, on the CPU."""
    error = rebuilt - d
    return torch.stack([error @ error, d @ d, rebuilt @ rebuilt, d @ rebuilt]).cpu()
