"""Unify, absorb, merge and decouple ranges of a model, in memory that the caller keeps.

For models that pass through memory piece by piece: a range is some consecutive elements of some
tensors. Where each begins on a chunk's border (:mod:`condu_ext.layout`), it gives exactly the
unified delta, mask bits and chunk sums that the whole tensor gives there. What the functions
compute, and which rows their chunk sums have, is in :mod:`condu_ext.reference`.

Common arguments:
    models, base: flat contiguous tensors of float32, bfloat16 or float16 on the CPU, at any
        alignment. ``base=None``: the models already are deltas.
    rescaler: λ per task and tensor of the range, float32 [tasks, tensors].
    out: where the result goes, exactly as large as these tensors need
        (:meth:`StateRange.narrowed`); what it holds before does not matter.
    via: per tensor the 16-bit dtype through which the base is rounded first, or None; empty: none.
    threads: of this call. Calls in several Python threads run beside one another.
    device: a GPU that computes. Everything is copied there and back on its current stream, in the
        background where memory is pinned; the call returns when ``out`` is filled.

Errors: ``ValueError`` for sizes that do not fit and tensors that are strided or elsewhere,
``TypeError`` for other dtypes.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from condu_ext import _arguments as arguments
from condu_ext import _native
from condu_ext._dispatch import ZERO_SUM_CODES, kernels_for
from condu_ext.layout import offsets
from condu_ext.reference import VIA_DTYPES
from condu_ext.rule import FusionRule


@dataclass
class StateRange:
    """Part of a state: an arena (:func:`condu_ext.layout.offsets`) of some tensors' ranges.

    Attributes:
        u: unified delta, float32 or bfloat16 [size].
        planes: per task a packed mask, uint8 [size / 8].
    """

    u: Tensor
    planes: list[Tensor]

    @classmethod
    def empty(
        cls, numels: Iterable[int], tasks: int, dtype: torch.dtype, *, pin: bool = False
    ) -> StateRange:
        """Memory for ranges of these sizes, not filled; ``pin`` for copies to and from a GPU."""
        size = offsets(numels)[1]

        def new(count: int, kind: torch.dtype) -> Tensor:
            return torch.empty(count, dtype=kind, device="cpu", pin_memory=pin)

        return cls(new(size, dtype), [new(size // 8, torch.uint8) for _ in range(tasks)])

    def narrowed(self, numels: Iterable[int]) -> StateRange:
        """Its first part, as large as ranges of these sizes need: views, for memory that is used
        again and again.

        Raises:
            ValueError: they need more.
        """
        size = offsets(numels)[1]
        if size > self.u.numel():
            raise ValueError(f"a range of {size} elements in memory for {self.u.numel()}")
        return StateRange(self.u[:size], [plane[: size // 8] for plane in self.planes])

    def clear_padding(self, numels: Sequence[int]) -> None:
        """Zero the unified delta between the tensors, as the kernels expect it of a state."""
        starts, size = offsets(numels)
        for start, numel, end in zip(starts, numels, [*starts[1:], size], strict=True):
            self.u[start + numel : end] = 0


def unify(
    models: Sequence[Sequence[Tensor]],
    base: Sequence[Tensor] | None,
    out: StateRange,
    *,
    rule: FusionRule,
    via: Sequence[torch.dtype | None] = (),
    threads: int = 1,
    device: torch.device | None = None,
) -> Tensor:
    """Unify ranges of several models, one for each task.

    Returns:
        Chunk sums, float64 [2 · tasks, chunks]: num of the tasks, then den of the tasks.
    """
    flat, start = [t for model in models for t in model], list(base or ())
    tasks, zero_sum, codes = len(models), ZERO_SUM_CODES[rule.zero_sum], _codes(via)
    _check_memory(out, tasks, arguments.numels_of(flat, tasks))
    gpu = _elsewhere(device)
    if gpu is None:
        written = (out.u, out.planes, threads)
        return _native.unify_into(flat, start, tasks, zero_sum, codes, *written)
    inputs = gpu.sent(flat), gpu.sent(start)
    return gpu.receive(gpu.kernels.unify(*inputs, tasks, zero_sum, out.u.dtype, codes), out)


def absorb(
    old: StateRange,
    rescaler: Tensor,
    model: Sequence[Tensor],
    base: Sequence[Tensor] | None,
    out: StateRange,
    *,
    rule: FusionRule,
    via: Sequence[torch.dtype | None] = (),
    threads: int = 1,
    device: torch.device | None = None,
) -> Tensor:
    """Absorb a range of one more model.

    ``out`` may have the memory of ``old`` (and one plane more), or none of it. The padding in
    ``old`` is overwritten.

    Returns:
        Chunk sums, float64 [old tasks + 2, chunks]: den of the old tasks and of the new one, num of
        the new one.
    """
    model, start = list(model), list(base or ())
    zero_sum, codes = ZERO_SUM_CODES[rule.zero_sum], _codes(via)
    numels = [t.numel() for t in model]
    _check_memory(old, len(old.planes), numels)
    _check_memory(out, len(old.planes) + 1, numels, old)
    old.clear_padding(numels)
    gpu = _elsewhere(device)
    if gpu is None:
        state, written = (old.u, old.planes, rescaler), (out.u, out.planes, threads)
        return _native.absorb_into(*state, model, start, zero_sum, codes, *written)
    inputs = *gpu.sent_state(old, rescaler), gpu.sent(model), gpu.sent(start)
    return gpu.receive(gpu.kernels.absorb(*inputs, zero_sum, codes), out)


def merge(
    a: StateRange,
    rescaler_a: Tensor,
    b: StateRange,
    rescaler_b: Tensor,
    numels: Sequence[int],
    out: StateRange,
    *,
    rule: FusionRule,
    threads: int = 1,
    device: torch.device | None = None,
) -> Tensor:
    """Merge the same ranges, of these sizes, of two states. The padding in both is overwritten.

    Returns:
        Chunk sums, float64 [tasks, chunks]: den of a's tasks, then of b's.
    """
    zero_sum = ZERO_SUM_CODES[rule.zero_sum]
    for state in (a, b):
        _check_memory(state, len(state.planes), numels, a)
    _check_memory(out, len(a.planes) + len(b.planes), numels, a)
    a.clear_padding(numels)
    b.clear_padding(numels)
    gpu = _elsewhere(device)
    if gpu is None:
        states = (a.u, a.planes, rescaler_a, b.u, b.planes, rescaler_b)
        return _native.merge_into(*states, numels, zero_sum, out.u, out.planes, threads)
    inputs = *gpu.sent_state(a, rescaler_a), *gpu.sent_state(b, rescaler_b)
    return gpu.receive(gpu.kernels.merge(*inputs, numels, zero_sum), out)


def decouple(
    expert: StateRange,
    rescaler: Tensor,
    base: Sequence[Tensor] | None,
    out: Sequence[Tensor],
    *,
    via: Sequence[torch.dtype | None] = (),
    threads: int = 1,
    device: torch.device | None = None,
) -> None:
    """Write θ_0 + λ·(M ⊙ u), or the decoupled delta without a base, of the only task of ``expert``
    into ``out``: flat tensors of the ranges' sizes, of any dtype that a model may have."""
    _check_memory(expert, 1, [t.numel() for t in out])
    out, start, codes = list(out), list(base or ()), _codes(via)
    gpu = _elsewhere(device)
    if gpu is None:
        (plane,) = expert.planes
        _native.decouple_into(out, expert.u, plane, rescaler, start, codes, threads)
    else:
        u, (plane,), scale = gpu.sent_state(expert, rescaler)
        there = [torch.empty_like(t, device=gpu.device) for t in out]
        gpu.kernels.decouple_(there, u, plane, scale, gpu.sent(start), codes)
        gpu.copy_back(there, out)


def opposite(rule: FusionRule) -> FusionRule:
    """The rule under which every zero sum is decided differently, for :func:`zero_sums`."""
    return replace(rule, zero_sum="positive" if rule.zero_sum == "negative" else "negative")


def zero_sums(out: StateRange, other: StateRange, numels: Sequence[int]) -> Tensor:
    """How many elements of each tensor add up to exactly zero though some task moved them: what
    ``rule.zero_sum`` decided.

    ``out`` and ``other`` are written by the same call of :func:`unify`, :func:`absorb` or
    :func:`merge`, under a rule and its :func:`opposite`. Where terms add up to zero, tasks of both
    signs take part in the election, so other mask bits are set, whatever becomes of u (which may
    underflow in a 16-bit state); everywhere else the results are equal. (Where a
    term λ·u is below 2⁻¹⁵⁰ and rounds to zero itself, the element may count.) The second call costs
    as much as the first, the comparison a tenth of it.

    Returns:
        int64 [tensors].
    """
    differs = np.zeros(out.u.numel() // 8, dtype=np.uint8)
    scratch = np.empty_like(differs)
    for mine, yours in zip(out.planes, other.planes, strict=True):
        np.bitwise_xor(mine.numpy(), yours.numpy(), out=scratch)
        np.bitwise_or(differs, scratch, out=differs)
    counts = []
    for start, numel in zip(offsets(numels)[0], numels, strict=True):
        bits = np.unpackbits(differs[start // 8 : (start + numel + 7) // 8])
        counts.append(np.count_nonzero(bits.view(np.bool_)))
    return torch.tensor(counts, dtype=torch.int64)


def add_chunks(numels: Sequence[int], chunk_sums: Tensor) -> Tensor:
    """Sums of whole tensors, float64 [rows, tensors], from all their chunk sums [rows, chunks],
    added in chunk order."""
    return _native.add_chunks(numels, chunk_sums)


def _codes(via: Sequence[torch.dtype | None]) -> list[int]:
    """The operators' codes of roundings."""
    return [VIA_DTYPES.index(dtype) for dtype in via]


def _check_memory(
    state: StateRange, tasks: int, numels: Sequence[int], like: StateRange | None = None
) -> None:
    """Before anything is written: as many tasks, as large as the tensors, of the same dtype."""
    if len(state.planes) != tasks:
        raise ValueError(f"a state range has {len(state.planes)} planes, but {tasks} tasks")
    arguments.check_arena(numels, state.u, state.planes)
    if like:
        arguments.check_same_dtype(like.u, state.u)


class _Elsewhere:
    """A GPU that computes for the CPU: the operators there, and copies to and fro."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.kernels = device, kernels_for(None, device)

    def sent(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        return [t.to(self.device, non_blocking=True) for t in tensors]

    def sent_state(
        self, state: StateRange, rescaler: Tensor
    ) -> tuple[Tensor, list[Tensor], Tensor]:
        u, rescaler, *planes = self.sent([state.u, rescaler, *state.planes])
        return u, planes, rescaler

    def receive(self, fused: tuple[Tensor, list[Tensor], Tensor], out: StateRange) -> Tensor:
        """The new state into ``out``; the chunk sums."""
        u, planes, sums = fused
        here = torch.empty(sums.shape, dtype=sums.dtype, device="cpu")
        self.copy_back([u, *planes, sums], [out.u, *out.planes, here])
        return here

    def copy_back(self, there: Sequence[Tensor], here: Sequence[Tensor]) -> None:
        """Complete on return."""
        for source, target in zip(there, here, strict=True):
            target.copy_(source, non_blocking=True)
        torch.cuda.current_stream(self.device).synchronize()


def _elsewhere(device: torch.device | None) -> _Elsewhere | None:
    """None where the CPU computes, in place."""
    return None if device is None or device.type == "cpu" else _Elsewhere(device)
