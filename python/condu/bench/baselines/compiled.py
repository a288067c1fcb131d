"""The formulas under ``torch.compile``: one fused function for each operation.

Called with a part of one tensor at a time (:data:`PART`), whose results it writes in place, and
compiled with dynamic shapes: once for each number of tasks and dtype. Absorb does not rebuild the
old deltas: it uses that all of them are λ·M⊙u, as the kernels do. The masks of up to 31 tasks are
the bits of one int32 an element: on a CPU (AVX-512, torch 2.15, 8 tasks) inductor's stores of bool
tensors took 50 times as long as everything else together.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor

import condu_ext as cx
from condu.bench.baselines.base import TAKEOVER, Baseline, Triggered, Weights
from condu.bench.cases import Case

PART = {"cpu": 1 << 20, "cuda": 1 << 26}
"""Elements a call at most; sums are float32 inside a part, float64 above it."""
WORD = 31
"""Tasks whose masks share an int32."""


@dataclass
class Packed:
    """A state by tensor name; the mask of task t is bit t % 31 of ``words[t // 31]``."""

    delta: dict[str, Tensor]
    words: list[dict[str, Tensor]]  # int32
    norms: list[float]
    rescalers: list[float]

    @classmethod
    def empty(cls, like: Weights, tasks: int, dtype: torch.dtype) -> Packed:
        words = [
            {name: torch.empty_like(t, dtype=torch.int32) for name, t in like.items()}
            for _ in range(_words(tasks))
        ]
        delta = {name: torch.empty_like(t, dtype=dtype) for name, t in like.items()}
        return cls(delta, words, [], [])

    @property
    def dtype(self) -> torch.dtype:
        return next(iter(self.delta.values())).dtype

    def zeros(self, count: int) -> Tensor:
        """Where sums are added up, on the device: reading them out each time would wait for it."""
        device = next(iter(self.delta.values())).device
        return torch.zeros(count, dtype=torch.float64, device=device)

    def table(self) -> list[Tensor]:
        """Rescalers on the device, one scalar tensor a task: as numbers they would be compiled
        into the function."""
        device = next(iter(self.delta.values())).device
        return list(torch.tensor(self.rescalers, device=device))

    def finish(self, norms: list[float], dens: Tensor) -> Packed:
        self.norms = norms
        self.rescalers = [n / d for n, d in zip(norms, dens.tolist(), strict=True)]
        return self


class Compiled(Baseline):
    """Whatever inductor makes of the formulas."""

    compiles = True

    def reset(self) -> None:
        torch._dynamo.reset()  # each case has its own number of tasks; there is a limit to variants

    def state_of(self, state: cx.UnifiedDelta) -> Packed:
        named = super().state_of(state)
        packed = Packed.empty(named.delta, len(named.masks), state.dtype)
        for name, u in named.delta.items():
            packed.delta[name].copy_(u)
            for first, word in zip(range(0, len(named.masks), WORD), packed.words, strict=True):
                word[name].copy_(_bits([m[name] for m in named.masks[first : first + WORD]]))
        packed.norms, packed.rescalers = named.norms, named.rescalers
        return packed

    def named(self, state: Packed) -> Triggered:
        masks = [
            {name: _bit(word, t) for name, word in state.words[t // WORD].items()}
            for t in range(len(state.rescalers))
        ]
        return Triggered(state.delta, masks, state.norms, state.rescalers)

    def unify(self, models: Sequence[Weights], pretrained: Weights, dtype: torch.dtype) -> Packed:
        out = Packed.empty(pretrained, len(models), dtype)
        norms, dens = out.zeros(len(models)), out.zeros(len(models))
        for cut in _parts(pretrained):
            num, den = cut.call(
                _unify_part, cut.all(models), cut(pretrained), cut(out.delta), cut.all(out.words)
            )
            norms += num
            dens += den
        return out.finish(norms.tolist(), dens)

    def absorb(self, state: Packed, finetuned: Weights, pretrained: Weights) -> Packed:
        tasks = len(state.rescalers)
        out = Packed.empty(pretrained, tasks + 1, state.dtype)
        rescalers = state.table()
        norm, dens = out.zeros(1), out.zeros(tasks + 1)
        for cut in _parts(pretrained):
            num, den = cut.call(
                _absorb_part,
                cut(state.delta),
                cut.all(state.words),
                rescalers,
                cut(finetuned),
                cut(pretrained),
                cut(out.delta),
                cut.all(out.words),
            )
            norm += num
            dens += den
        return out.finish([*state.norms, *norm.tolist()], dens)

    def merge(self, a: Packed, b: Packed) -> Packed:
        tasks = len(a.rescalers) + len(b.rescalers)
        out = Packed.empty(a.delta, tasks, a.dtype)
        rescalers_a, rescalers_b = a.table(), b.table()
        dens = out.zeros(tasks)
        for cut in _parts(a.delta):
            dens += cut.call(
                _merge_part,
                cut(a.delta),
                cut.all(a.words),
                rescalers_a,
                cut(b.delta),
                cut.all(b.words),
                rescalers_b,
                cut(out.delta),
                cut.all(out.words),
            )
        return out.finish([*a.norms, *b.norms], dens)

    def decouple_(self, state: Packed, task: int, pretrained: Weights, out: Weights) -> None:
        rescaler, words = state.table()[task], state.words[task // WORD]
        bit = torch.tensor(1 << task % WORD, dtype=torch.int32, device=rescaler.device)
        for cut in _parts(pretrained):
            cut.call(
                _decouple_part,
                cut(state.delta),
                cut(words),
                bit,
                rescaler,
                cut(pretrained),
                cut(out),
            )

    def extra_bytes(self, case: Case, device: torch.device) -> int:
        n, tasks, u = case.parameters, case.tasks, case.dtypes.state_bytes
        model = case.dtypes.model_bytes
        # while a state is taken over, its masks by name are there as well
        incoming = 0 if case.operation == "unify" else u + 4 * _words(tasks) + tasks + TAKEOVER
        new = case.tasks + case.operation.startswith("absorb")
        created = model if case.operation == "decouple_" else u + 4 * _words(new)
        return n * (incoming + created) + 16 * min(PART[device.type], n)


def _words(tasks: int) -> int:
    return (tasks + WORD - 1) // WORD


def _bits(masks: Sequence[Tensor]) -> Tensor:
    """One int32 from up to 31 masks."""
    word = masks[0].to(torch.int32)
    for t, mask in enumerate(masks[1:], 1):
        word = word | (mask.to(torch.int32) << t)
    return word


def _bit(word: Tensor, task: int) -> Tensor:
    return ((word >> (task % WORD)) & 1) != 0


def _unify_part(
    models: list[Tensor], base: Tensor, u: Tensor, words: list[Tensor]
) -> tuple[Tensor, Tensor]:
    theta_0 = base.float()
    deltas = [model.float() - theta_0 for model in models]
    total = deltas[0]
    for delta in deltas[1:]:
        total = total + delta
    flag = torch.where(total > 0, 1.0, -1.0)
    agreeing = [delta * flag for delta in deltas]
    best = agreeing[0]
    for value in agreeing[1:]:
        best = torch.maximum(best, value)
    den = _store(u, words, best, flag, [value > 0 for value in agreeing])
    return torch.stack([delta.abs().sum() for delta in deltas]), den


def _absorb_part(
    old: Tensor,
    old_words: list[Tensor],
    rescalers: list[Tensor],
    model: Tensor,
    base: Tensor,
    u: Tensor,
    words: list[Tensor],
) -> tuple[Tensor, Tensor]:
    old = old.float()
    delta = model.float() - base.float()
    masks, sum_, most = _of_old_tasks(old_words, rescalers)
    flag = torch.where(old * sum_ + delta > 0, 1.0, -1.0)
    kept, new = old * flag, delta * flag
    best = torch.maximum(kept * most, new)
    den = _store(u, words, best, flag, [*(mask & (kept > 0) for mask in masks), new > 0])
    return delta.abs().sum(), den


def _merge_part(
    a: Tensor,
    words_a: list[Tensor],
    rescalers_a: list[Tensor],
    b: Tensor,
    words_b: list[Tensor],
    rescalers_b: list[Tensor],
    u: Tensor,
    words: list[Tensor],
) -> Tensor:
    a, b = a.float(), b.float()
    masks_a, sum_a, most_a = _of_old_tasks(words_a, rescalers_a)
    masks_b, sum_b, most_b = _of_old_tasks(words_b, rescalers_b)
    flag = torch.where(a * sum_a + b * sum_b > 0, 1.0, -1.0)
    kept_a, kept_b = a * flag, b * flag
    best = torch.maximum(kept_a * most_a, kept_b * most_b)
    masks = [*(mask & (kept_a > 0) for mask in masks_a), *(mask & (kept_b > 0) for mask in masks_b)]
    return _store(u, words, best, flag, masks)


def _decouple_part(
    u: Tensor, word: Tensor, bit: Tensor, rescaler: Tensor, base: Tensor, out: Tensor
) -> None:
    theta_0 = base.float()
    out.copy_(torch.where((word & bit) != 0, theta_0 + rescaler * u.float(), theta_0))


def _of_old_tasks(
    words: list[Tensor], rescalers: list[Tensor]
) -> tuple[list[Tensor], Tensor, Tensor]:
    """Masks; sum (in groups of four tasks) and maximum of λ_i·M_i."""
    masks = [_bit(words[t // WORD], t) for t in range(len(rescalers))]
    terms = [torch.where(mask, rescaler, 0.0) for mask, rescaler in zip(masks, rescalers)]  # noqa: B905
    fours = [sum(terms[k + 1 : k + 4], terms[k]) for k in range(0, len(terms), 4)]
    most = terms[0]
    for term in terms[1:]:
        most = torch.maximum(most, term)
    return masks, sum(fours[1:], fours[0]), most


def _store(
    u: Tensor, words: list[Tensor], best: Tensor, flag: Tensor, masks: list[Tensor]
) -> Tensor:
    """Writes u = flag · max(best, 0) and the masks; returns Σ M·|u| of each task."""
    stored = _rounded(torch.where(best > 0, flag * best, 0.0), u.dtype)
    u.copy_(stored)
    for k, word in enumerate(words):
        word.copy_(_bits(masks[WORD * k : WORD * (k + 1)]))
    size = stored.abs()
    return torch.stack([torch.where(mask, size, 0.0).sum() for mask in masks])


def _rounded(values: Tensor, dtype: torch.dtype) -> Tensor:
    """Values of float32 rounded to the state's dtype. To bfloat16 (ties to even) with integers:
    inductor drops a conversion there and back, and the sums would be of values not stored."""
    if dtype == torch.float32:
        return values
    bits = values.view(torch.int32)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) & -0x10000).view(torch.float32)


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
        numel, most = model[name].numel(), PART[model[name].device.type]
        for start in range(0, numel, most):
            yield _Cut(name, slice(start, min(start + most, numel)))
