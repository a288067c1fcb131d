"""A model large enough that results go past the caches, against the same model in two parts.

Run as a script, so that CONDU_CPU_ISA chooses the instruction set. The parts are below the size
(csrc/cpu/memory.h) from which stores bypass the caches; every number must be equal, sums included,
for the cut lies between two chunks.
"""

from __future__ import annotations

import torch
from kernel_cases import BF16, F16, F32, same_bytes
from torch import Tensor

from condu_ext import _ops

CUT = 8 << 20
WHOLE = [70_001, 2 * CUT, 513, 1]
TASKS = 3
Model = list[Tensor]


def parts(model: Model) -> tuple[Model, Model]:
    a, long, b, c = model
    return [a, long[:CUT]], [long[CUT:], b, c]


def run(base: Model, models: list[Model], state: torch.dtype, out: torch.dtype) -> list[Tensor]:
    """Everything that the operators return, arenas and chunk sums, and the decoupled weights."""
    flat = [t for model in models[:TASKS] for t in model]
    u, planes, sums = _ops.unify(flat, base, TASKS, 0, state, [])
    rescaler = torch.full((TASKS, len(base)), 1.25)
    made = _ops.absorb(u, planes, rescaler, models[TASKS], base, 2, [])
    one = (*_ops.unify(models[TASKS], base, 1, 0, state, [])[:2], rescaler[:1])
    merged = _ops.merge(u, planes, rescaler, *one, [t.numel() for t in base], 1)
    theta = [torch.full(t.shape, torch.nan, dtype=out) for t in base]
    _ops.decouple_(theta, u, planes[0], rescaler[:1], base, [])
    gathered = []
    for arena, bits, chunk_sums in ((u, planes, sums), made, merged):
        gathered += [arena, *bits, *chunk_sums]
    return [*gathered, torch.cat(theta)]


def check(dtype: torch.dtype, state: torch.dtype, out: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    drawn = [
        [torch.randn(n, generator=generator).to(dtype) for n in WHOLE] for _ in range(TASKS + 2)
    ]
    whole = run(drawn[0], drawn[1:], state, out)
    first, second = zip(*map(parts, drawn), strict=True)
    halves = (run(half[0], list(half[1:]), state, out) for half in (first, second))
    for k, (found, a, b) in enumerate(zip(whole, *halves, strict=True)):
        assert same_bytes(found, torch.cat([a, b])), f"{dtype}, {state}: result {k}"


if __name__ == "__main__":
    torch.set_num_threads(2)
    check(F32, F32, F32)
    check(BF16, BF16, BF16)
    check(F16, F32, F16)
