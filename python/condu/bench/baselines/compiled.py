"""The formulas under ``torch.compile``: one fused function for each operation.

Called with at most :data:`PART` elements of one tensor at a time, whose results it writes in place;
compiled with dynamic shapes, so once for each number of tasks and dtype. Absorb does not rebuild
the old deltas: it uses that all of them are λ·M⊙u, as the kernels do.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor

from condu.bench.baselines.base import Baseline, Triggered, Weights
from condu.bench.cases import Case

PART = 1 << 20
"""Elements a call; sums are float32 inside a part, float64 above it."""


class Compiled(Baseline):
    """Whatever inductor makes of the formulas."""

    compiles = True

    def reset(self) -> None:
        torch._dynamo.reset()  # each case has its own number of tasks; there is a limit to variants

    def unify(
        self, models: Sequence[Weights], pretrained: Weights, dtype: torch.dtype
    ) -> Triggered:
        out = _empty(pretrained, len(models), dtype)
        norms, dens = torch.zeros(2, len(models), dtype=torch.float64)
        for cut in _parts(pretrained):
            num, den = cut.call(
                _unify_part, cut.all(models), cut(pretrained), cut(out.delta), cut.all(out.masks)
            )
            norms, dens = norms + num.cpu(), dens + den.cpu()
        return _finished(out, norms.tolist(), dens)

    def absorb(self, state: Triggered, finetuned: Weights, pretrained: Weights) -> Triggered:
        tasks = len(state.masks)
        out = _empty(pretrained, tasks + 1, _dtype_of(state))
        rescalers = _table(state)
        norm, dens = 0.0, torch.zeros(tasks + 1, dtype=torch.float64)
        for cut in _parts(pretrained):
            num, den = cut.call(
                _absorb_part,
                cut(state.delta),
                cut.all(state.masks),
                rescalers,
                cut(finetuned),
                cut(pretrained),
                cut(out.delta),
                cut.all(out.masks),
            )
            norm, dens = norm + float(num), dens + den.cpu()
        return _finished(out, [*state.norms, norm], dens)

    def merge(self, a: Triggered, b: Triggered) -> Triggered:
        tasks = len(a.masks) + len(b.masks)
        out = _empty(a.delta, tasks, _dtype_of(a))
        rescalers_a, rescalers_b = _table(a), _table(b)
        dens = torch.zeros(tasks, dtype=torch.float64)
        for cut in _parts(a.delta):
            den = cut.call(
                _merge_part,
                cut(a.delta),
                cut.all(a.masks),
                rescalers_a,
                cut(b.delta),
                cut.all(b.masks),
                rescalers_b,
                cut(out.delta),
                cut.all(out.masks),
            )
            dens = dens + den.cpu()
        return _finished(out, [*a.norms, *b.norms], dens)

    def decouple_(self, state: Triggered, task: int, pretrained: Weights, out: Weights) -> None:
        rescaler, mask = _table(state)[task], state.masks[task]
        for cut in _parts(pretrained):
            cut.call(
                _decouple_part, cut(state.delta), cut(mask), rescaler, cut(pretrained), cut(out)
            )

    def extra_bytes(self, case: Case, device: torch.device) -> int:
        n, tasks, u = case.parameters, case.tasks, case.dtypes.state_bytes
        incoming = 0 if case.operation == "unify" else tasks
        created = {"unify": u + tasks, "decouple_": case.dtypes.model_bytes, "merge": u + tasks}
        own = n * (incoming + created.get(case.operation, u + tasks + 1))
        return own + 16 * min(PART, n)


def _unify_part(
    models: list[Tensor], base: Tensor, u: Tensor, masks: list[Tensor]
) -> tuple[Tensor, Tensor]:
    theta_0 = base.float()
    deltas = [model.float() - theta_0 for model in models]
    total = deltas[0]
    for delta in deltas[1:]:
        total = total + delta
    flag = torch.where(total > 0, 1.0, -1.0)
    size = _store(u, masks, [delta * flag for delta in deltas], flag)
    return torch.stack([delta.abs().sum() for delta in deltas]), _masked_sums(masks, size)


def _absorb_part(
    old: Tensor,
    old_masks: list[Tensor],
    rescalers: Tensor,
    model: Tensor,
    base: Tensor,
    u: Tensor,
    masks: list[Tensor],
) -> tuple[Tensor, Tensor]:
    old = old.float()
    delta = model.float() - base.float()
    sum_, most = _of_old_tasks(old_masks, rescalers)
    flag = torch.where(old * sum_ + delta > 0, 1.0, -1.0)
    kept = old * flag > 0
    for target, mask in zip(masks, old_masks, strict=False):
        target.copy_(mask & kept)
    size = _store(u, masks[-1:], [delta * flag], flag, old * flag * most)
    return delta.abs().sum(), _masked_sums(masks, size)


def _merge_part(
    a: Tensor,
    masks_a: list[Tensor],
    rescalers_a: Tensor,
    b: Tensor,
    masks_b: list[Tensor],
    rescalers_b: Tensor,
    u: Tensor,
    masks: list[Tensor],
) -> Tensor:
    a, b = a.float(), b.float()
    sum_a, most_a = _of_old_tasks(masks_a, rescalers_a)
    sum_b, most_b = _of_old_tasks(masks_b, rescalers_b)
    flag = torch.where(a * sum_a + b * sum_b > 0, 1.0, -1.0)
    kept = [a * flag > 0] * len(masks_a) + [b * flag > 0] * len(masks_b)
    for target, mask, keep in zip(masks, [*masks_a, *masks_b], kept, strict=True):
        target.copy_(mask & keep)
    best = torch.maximum(a * flag * most_a, b * flag * most_b)
    return _masked_sums(masks, _store(u, [], [], flag, best))


def _decouple_part(u: Tensor, mask: Tensor, rescaler: Tensor, base: Tensor, out: Tensor) -> None:
    theta_0 = base.float()
    out.copy_(torch.where(mask, theta_0 + rescaler * u.float(), theta_0))


def _of_old_tasks(masks: list[Tensor], rescalers: Tensor) -> tuple[Tensor, Tensor]:
    """Sum (in groups of four tasks) and maximum of λ_i·M_i."""
    terms = [torch.where(mask, rescalers[t], 0.0) for t, mask in enumerate(masks)]
    fours = [sum(terms[k + 1 : k + 4], terms[k]) for k in range(0, len(terms), 4)]
    most = terms[0]
    for term in terms[1:]:
        most = torch.maximum(most, term)
    return sum(fours[1:], fours[0]), most


def _store(
    u: Tensor,
    masks: list[Tensor],
    agreeing: list[Tensor],
    flag: Tensor,
    best: Tensor | None = None,
) -> Tensor:
    """Writes u and the masks of deltas given as d·flag; returns the stored magnitudes."""
    for value in agreeing:
        best = value if best is None else torch.maximum(best, value)
    for mask, value in zip(masks, agreeing, strict=True):
        mask.copy_(value > 0)
    assert best is not None
    stored = _rounded(torch.where(best > 0, flag * best, 0.0), u.dtype)
    u.copy_(stored)
    return stored.abs()


def _rounded(values: Tensor, dtype: torch.dtype) -> Tensor:
    """Values of float32 rounded to the state's dtype. To bfloat16 (ties to even) with integers:
    inductor drops a conversion there and back, and the sums would be of values not stored."""
    if dtype == torch.float32:
        return values
    bits = values.view(torch.int32)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) & -0x10000).view(torch.float32)


def _masked_sums(masks: list[Tensor], size: Tensor) -> Tensor:
    return torch.stack([torch.where(mask, size, 0.0).sum() for mask in masks])


@cache
def _compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    return torch.compile(function, fullgraph=True, dynamic=True)


class _Cut:
    """The elements of one tensor that a call works on."""

    def __init__(self, name: str, part: slice) -> None:
        self.name, self.part = name, part

    def __call__(self, model: Weights) -> Tensor:
        return model[self.name].view(-1)[self.part]

    def all(self, models: Sequence[Weights]) -> list[Tensor]:
        return [self(model) for model in models]

    def call(self, function: Callable[..., Any], *arguments: Any) -> Any:
        """The compiled function; the plain one on one element, whose size would be compiled in."""
        if self.part.stop - self.part.start > 1:
            function = _compiled(function)
        return function(*arguments)


def _parts(model: Weights) -> Iterator[_Cut]:
    """Largest tensors first: what is compiled at the first call is tuned to its size."""
    for name in sorted(model, key=lambda name: -model[name].numel()):
        numel = model[name].numel()
        for start in range(0, numel, PART):
            yield _Cut(name, slice(start, min(start + PART, numel)))


def _empty(like: Weights, tasks: int, dtype: torch.dtype) -> Triggered:
    delta = {name: torch.empty_like(t, dtype=dtype) for name, t in like.items()}
    masks = [
        {name: torch.empty_like(t, dtype=torch.bool) for name, t in like.items()}
        for _ in range(tasks)
    ]
    return Triggered(delta, masks, [], [])


def _dtype_of(state: Triggered) -> torch.dtype:
    return next(iter(state.delta.values())).dtype


def _table(state: Triggered) -> Tensor:
    return torch.tensor(state.rescalers, device=next(iter(state.delta.values())).device)


def _finished(out: Triggered, norms: list[float], dens: Tensor) -> Triggered:
    out.norms = norms
    out.rescalers = [n / d for n, d in zip(norms, dens.tolist(), strict=True)]
    return out
