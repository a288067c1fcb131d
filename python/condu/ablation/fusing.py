"""ConDU's fusion with parts of it exchanged, in plain PyTorch.

What ConDU does (arXiv 2503.10705; elect, mask and rescale as in EMR-Merging, arXiv 2405.17461) is
`Fusing()`, and equals ``condu_ext.reference`` in the unified delta and every mask bit. Whatever is
exchanged, the decoupled delta of a task is λ·M ⊙ u, so all that absorbing has to know of the old
tasks at an element are u, the sum and the greatest of their λ·M, and how many of these are not 0.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from condu_ext.reference import GROUP, elect, elected
from condu_ext.rescale import rescalers
from condu_ext.rule import FusionRule, Rescale, ZeroSum

Sign = Literal["sum", "majority", "random"]
Value = Literal["extreme", "agreeing_mean", "mean"]


@dataclass(frozen=True)
class Fusing:
    """How delta models d_i (of old tasks: the decoupled ones) become one unified delta u.

    - ``sign`` of u: ``"sum"``, that of Σ d_i (TIES and EMR-Merging too); ``"majority"``, that of
      most d_i whatever their size, which TIES-Merging's implementations offer as "count" or
      "frequency"; ``"random"``, that of one d_i, drawn among those that are not 0.
    - ``value``, the size of u: ``"extreme"``, the greatest of those d_i that have that sign (so
      with ``"sum"`` u is the maximum or the minimum of all); ``"agreeing_mean"``, the mean of those
      that have that sign (TIES-Merging's disjoint mean); ``"mean"``, the size of the mean of all,
      so that with ``"sum"`` u is their plain average.
    - ``masks``: whether a task keeps the elements of u whose sign its own delta had, or all.
    - ``rescale``: how λ is formed, see ``condu_ext.FusionRule``; ``"none"`` is λ = 1.
    - ``zero_sum``: the sign where the sum, or the majority, is exactly 0.
    """

    sign: Sign = "sum"
    value: Value = "extreme"
    masks: bool = True
    rescale: Rescale | Literal["none"] = "global"
    zero_sum: ZeroSum = "negative"


class AblatedDelta:
    """A unified delta and the task triggers over it, made by absorbing one delta model after the
    other.

    ``delta``: u by tensor name in ``dtype``. ``masks[t]``: bool by name; empty mappings without
    masks. ``rescaler``: λ float32 [tasks, tensors], on the CPU. ``ties`` and ``moved``: at the last
    absorption the elements whose sum was exactly 0 though the new delta was not, and those where it
    was not.
    """

    def __init__(
        self,
        fusing: Fusing,
        like: Mapping[str, Tensor],
        *,
        dtype: torch.dtype = torch.float32,
        seed: int = 0,
    ) -> None:
        self.fusing = fusing
        self.delta = {name: torch.zeros_like(t, dtype=dtype) for name, t in like.items()}
        self.masks: list[dict[str, Tensor]] = []
        self.rescaler = torch.ones(0, len(like))
        self.ties = self.moved = 0
        self._num = torch.zeros(0, len(like), dtype=torch.float64)
        self._draw = torch.Generator().manual_seed(seed)

    def absorb(self, delta: Mapping[str, Tensor]) -> None:
        """Decouple every task so far and unify all with one more delta model, float32 by tensor
        name, whose elements must be finite."""
        tasks = len(self.masks) + 1
        self.masks.append({})
        self.ties = self.moved = 0
        num, den = torch.zeros(2, tasks, len(self.delta), dtype=torch.float64)
        num[:-1] = self._num
        for k, name in enumerate(self.delta):
            self._absorb_tensor(name, self.rescaler[:, k], delta[name])
            size = self.delta[name].float().abs()
            num[-1, k] = delta[name].abs().sum(dtype=torch.float64)
            for t, masks in enumerate(self.masks):
                kept = size * masks[name] if self.fusing.masks else size
                den[t, k] = kept.sum(dtype=torch.float64)
        self._num = num
        if self.fusing.rescale == "none":
            self.rescaler = torch.ones(num.shape)
        else:
            rule = FusionRule(zero_sum=self.fusing.zero_sum, rescale=self.fusing.rescale)
            self.rescaler = rescalers(rule, num, den, [u.numel() for u in self.delta.values()])

    def decouple(self, task: int) -> dict[str, Tensor]:
        """The decoupled delta λ·M ⊙ u of task number ``task``, float32 by tensor name."""
        decoupled = {}
        for k, (name, u) in enumerate(self.delta.items()):
            scaled = float(self.rescaler[task, k]) * u.float()
            kept = self.masks[task].get(name)
            decoupled[name] = scaled if kept is None else torch.where(kept, scaled, 0.0)
        return decoupled

    def _absorb_tensor(self, name: str, rescaler: Tensor, d: Tensor) -> None:
        old = self.delta[name].float()
        total_scale, largest, voters = self._triggers(name, rescaler, old)
        total = old * total_scale + d
        self.ties += int(((total == 0) & (d != 0)).sum())
        self.moved += int((d != 0).sum())
        flag = self._flag(total, voters * old.sign() + d.sign(), voters * (old != 0) + (d != 0))
        kept, joined = old * flag > 0, d * flag > 0
        if self.fusing.value == "extreme":
            best = torch.maximum(
                torch.where(kept, old.abs() * largest, 0.0), torch.where(joined, d.abs(), 0.0)
            )
        elif self.fusing.value == "agreeing_mean":
            best = torch.where(kept, old.abs() * total_scale, 0.0)
            best = best + torch.where(joined, d.abs(), 0.0)
            best = best / (kept * voters + joined).clamp(min=1)
        else:
            best = total.abs() / len(self.masks)
        self.delta[name] = elected(best, flag, self.delta[name].dtype)
        if self.fusing.masks:
            for masks in self.masks[:-1]:
                masks[name] = masks[name] & kept
            self.masks[-1][name] = joined

    def _triggers(self, name: str, rescaler: Tensor, u: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Per element the sum and the greatest of λ_i·M_i of the old tasks, and how many are not 0,
        all float32. Summed in the order of the kernels, in groups of tasks."""
        terms = [
            torch.where(self.masks[t][name], scale, 0.0)
            if self.fusing.masks
            else torch.full_like(u, scale)
            for t, scale in enumerate(rescaler.tolist())
        ]
        total, largest, voters = (torch.zeros_like(u) for _ in range(3))
        for first in range(0, len(terms), GROUP):
            total = total + sum(terms[first + 1 : first + GROUP], terms[first])
        for term in terms:
            largest = torch.maximum(largest, term)
            voters = voters + (term != 0)
        return total, largest, voters

    def _flag(self, total: Tensor, majority: Tensor, voters: Tensor) -> Tensor:
        """The elected sign, from the sum of the deltas, the sum of their signs, and how many of
        them are not 0."""
        code = get_args(ZeroSum).index(self.fusing.zero_sum)  # the operators' code for it
        if self.fusing.sign == "sum":
            return elect(total, code)
        if self.fusing.sign == "majority":
            return elect(majority, code)
        draw = torch.rand(total.shape, generator=self._draw).to(total.device) * voters
        return torch.where(draw < (voters + majority) / 2, 1.0, -1.0)
