"""The best that we could write in eager PyTorch.

No delta is ever whole in memory. The model is worked on in groups of elements
(:mod:`condu.bench.baselines.flat`), with a scratch matrix that is written in place, ``_foreach_``
operations to gather many small tensors at once, masks in one matrix, and sums as matrix–vector
products. Absorb does not rebuild the old deltas: it uses that all of them are λ·M⊙u, as the kernels
do. Values and masks are the kernels', bit for bit.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

import condu_ext as cx
from condu.bench.baselines.base import TAKEOVER, Baseline, Weights
from condu.bench.baselines.flat import GROUP, FlatState, Group, groups, shapes_of
from condu.bench.cases import Case


class Eager(Baseline):
    """In place, in groups that fit the cache, without a stack of whole deltas."""

    def state_of(self, state: cx.UnifiedDelta) -> FlatState:
        return FlatState.of(state)

    def unify(
        self, models: Sequence[Weights], pretrained: Weights, dtype: torch.dtype
    ) -> FlatState:
        shapes, tasks = shapes_of(pretrained), len(models)
        device = next(iter(pretrained.values())).device
        out = FlatState.empty(shapes, tasks, dtype, device)
        num, den = torch.zeros(2, tasks, dtype=torch.float64, device=device)
        scratch = torch.empty(tasks, GROUP[device.type], device=device)
        for group in groups(shapes, device):
            deltas = scratch[:, : group.size]
            for row, model in zip(deltas, models, strict=True):
                _subtract(group, row, model, pretrained)
            total = deltas[0].clone()
            for row in deltas[1:]:
                total.add_(row)
            num += torch.linalg.vector_norm(deltas, 1, dim=1)
            flag = _elected_sign(total)
            deltas.mul_(flag)
            masks = torch.gt(deltas, 0, out=out.bits[:, group.part])
            size = _store(out, group, deltas.amax(0), flag)
            den += _masked_sums(masks, size, deltas)
        return _finished(out, num.tolist(), den)

    def absorb(self, state: FlatState, finetuned: Weights, pretrained: Weights) -> FlatState:
        shapes, tasks, device = shapes_of(pretrained), len(state.bits), state.values.device
        out = FlatState.empty(shapes, tasks + 1, state.values.dtype, device)
        num = torch.zeros((), dtype=torch.float64, device=device)
        den = torch.zeros(tasks + 1, dtype=torch.float64, device=device)
        scratch = torch.empty(tasks + 1, GROUP[device.type], device=device)
        delta = torch.empty(GROUP[device.type], device=device)
        for group in groups(shapes, device):
            new = delta[: group.size]
            _subtract(group, new, finetuned, pretrained)
            num += torch.linalg.vector_norm(new, 1)
            old, sum_, most = _of_old_tasks(state, group, scratch[:tasks, : group.size])
            flag = _elected_sign((old * sum_).add_(new))
            old.mul_(flag)
            new.mul_(flag)
            masks = out.bits[:, group.part]
            torch.logical_and(state.bits[:, group.part], old > 0, out=masks[:-1])
            torch.gt(new, 0, out=masks[-1])
            size = _store(out, group, torch.maximum(old.mul_(most), new), flag)
            den += _masked_sums(masks, size, scratch[:, : group.size])
        return _finished(out, [*state.norms, float(num)], den)

    def merge(self, a: FlatState, b: FlatState) -> FlatState:
        shapes, device = shapes_of(a.delta), a.values.device
        first, tasks = len(a.bits), len(a.bits) + len(b.bits)
        out = FlatState.empty(shapes, tasks, a.values.dtype, device)
        den = torch.zeros(tasks, dtype=torch.float64, device=device)
        scratch = torch.empty(tasks, GROUP[device.type], device=device)
        for group in groups(shapes, device):
            old_a, sum_a, most_a = _of_old_tasks(a, group, scratch[:first, : group.size])
            old_b, sum_b, most_b = _of_old_tasks(b, group, scratch[first:, : group.size])
            flag = _elected_sign((old_a * sum_a).add_(old_b * sum_b))
            old_a.mul_(flag)
            old_b.mul_(flag)
            masks = out.bits[:, group.part]
            torch.logical_and(a.bits[:, group.part], old_a > 0, out=masks[:first])
            torch.logical_and(b.bits[:, group.part], old_b > 0, out=masks[first:])
            best = torch.maximum(old_a.mul_(most_a), old_b.mul_(most_b))
            size = _store(out, group, best, flag)
            den += _masked_sums(masks, size, scratch[:, : group.size])
        return _finished(out, [*a.norms, *b.norms], den)

    def decouple_(self, state: FlatState, task: int, pretrained: Weights, out: Weights) -> None:
        rescaler = state.rescalers[task]
        for group in groups(shapes_of(pretrained), state.values.device):
            expert = state.values[group.part].to(torch.float32, copy=True).mul_(rescaler)
            expert.mul_(state.bits[task, group.part])
            pieces = group.views(expert)
            torch._foreach_add_(pieces, group.of(pretrained))
            torch._foreach_copy_(group.of(out), pieces)

    def extra_bytes(self, case: Case, device: torch.device) -> int:
        n, tasks, u = case.parameters, case.tasks, case.dtypes.state_bytes
        incoming = 0 if case.operation == "unify" else u + tasks + TAKEOVER
        created = {"unify": u + tasks, "decouple_": case.dtypes.model_bytes, "merge": u + tasks}
        own = n * (incoming + created.get(case.operation, u + tasks + 1))
        return own + 4 * min(GROUP[device.type], n) * (tasks + 9)


def _subtract(group: Group, out: Tensor, model: Weights, pretrained: Weights) -> None:
    """The delta of a group in float32: converted first, then one subtraction."""
    pieces = group.views(out)
    torch._foreach_copy_(pieces, group.of(model))
    torch._foreach_sub_(pieces, group.of(pretrained))


def _elected_sign(total: Tensor) -> Tensor:
    return torch.where(total > 0, 1.0, -1.0)


def _of_old_tasks(state: FlatState, group: Group, scratch: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """u of a group in float32, and the sum and the maximum of λ_i·M_i over the tasks; ``scratch``
    has a row for each task and is overwritten."""
    old = state.values[group.part].to(torch.float32, copy=True)
    table = torch.tensor(state.rescalers, device=old.device).view(-1, 1)
    terms = scratch.copy_(state.bits[:, group.part]).mul_(table)
    most = terms.amax(0)
    for first in range(0, len(terms), 4):  # the order of the rule: groups of four tasks
        for term in terms[first + 1 : first + 4]:
            terms[first].add_(term)
        if first:
            terms[0].add_(terms[first])
    return old, terms[0], most


def _store(out: FlatState, group: Group, best: Tensor, flag: Tensor) -> Tensor:
    """Writes flag · max(best, 0) into the unified delta; returns the stored magnitudes."""
    values = out.values[group.part]
    # + 0 turns the -0 of an element that no task agrees on into the rule's +0
    values.copy_(best.clamp_min_(0).mul_(flag).add_(0.0))
    return values.float().abs()


def _masked_sums(masks: Tensor, size: Tensor, scratch: Tensor) -> Tensor:
    """Σ M·|u| of a group for each task; ``scratch`` is overwritten."""
    return torch.mv(scratch.copy_(masks), size)


def _finished(out: FlatState, norms: list[float], den: Tensor) -> FlatState:
    out.norms = norms
    out.rescalers = [n / d for n, d in zip(norms, den.tolist(), strict=True)]
    return out
