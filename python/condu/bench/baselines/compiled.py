"""The formulas under ``torch.compile``: one fused function for each operation.

Called with a part of one tensor at a time (:data:`PART`), whose results it writes in place, and
compiled with dynamic shapes: once for each number of tasks and dtype. Absorb does not rebuild the
old deltas: it uses that all of them are λ·M⊙u, as the kernels do.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor

import condu_ext as cx
from condu.bench.baselines import formulas
from condu.bench.baselines.base import TAKEOVER, Baseline, Triggered, Weights
from condu.bench.baselines.formulas import bit, bits
from condu.bench.cases import Case

PART = {"cpu": 1 << 20, "cuda": 1 << 26}
"""Elements a call at most; sums are float32 inside a part, float64 above it."""


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
            for first, word in zip(
                range(0, len(named.masks), formulas.WORD), packed.words, strict=True
            ):
                word[name].copy_(
                    bits([m[name] for m in named.masks[first : first + formulas.WORD]])
                )
        packed.norms, packed.rescalers = named.norms, named.rescalers
        return packed

    def named(self, state: Packed) -> Triggered:
        masks = [
            {name: bit(word, t) for name, word in state.words[t // formulas.WORD].items()}
            for t in range(len(state.rescalers))
        ]
        return Triggered(state.delta, masks, state.norms, state.rescalers)

    def unify(self, models: Sequence[Weights], pretrained: Weights, dtype: torch.dtype) -> Packed:
        out = Packed.empty(pretrained, len(models), dtype)
        norms, dens = out.zeros(len(models)), out.zeros(len(models))
        for cut in _parts(pretrained):
            num, den = cut.call(
                formulas.unify_part,
                cut.all(models),
                cut(pretrained),
                cut(out.delta),
                cut.all(out.words),
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
                formulas.absorb_part,
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
                formulas.merge_part,
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
        rescaler, words = state.table()[task], state.words[task // formulas.WORD]
        flag = torch.tensor(1 << task % formulas.WORD, dtype=torch.int32, device=rescaler.device)
        for cut in _parts(pretrained):
            cut.call(
                formulas.decouple_part,
                cut(state.delta),
                cut(words),
                flag,
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
    return (tasks + formulas.WORD - 1) // formulas.WORD


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
