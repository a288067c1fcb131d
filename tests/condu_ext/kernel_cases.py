"""Inputs for the operators, one run of all of them, and comparison byte by byte.

Half of the elements are built to be awkward: base values on a coarse grid and deltas of a few grid
steps, so that sums cancel exactly; zeros of both signs; subnormals of the model's own dtype.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
DTYPES = {"fp32": [F32], "bf16": [BF16], "fp16": [F16], "mixed": [F32, BF16, F16]}
SMALL = (0, 1, 7, 8, 15, 16, 17, 31, 32, 33, 0, 63, 64, 65, 255, 256, 257)
EDGES = (511, 512, 513, 1023, 1024, 1025, 65535, 65536, 65537, 131073, 0, 1)
_SMALLEST = {F32: 2.0**-149, BF16: 2.0**-133, F16: 2.0**-24}


def same_bytes(a: Tensor, b: Tensor) -> bool:
    """Equal in dtype, shape and every bit: -0.0 is not +0.0, a NaN equals itself."""
    if a.dtype != b.dtype or a.shape != b.shape:
        return False
    a, b = a.detach().contiguous().view(-1), b.detach().contiguous().view(-1)
    return torch.equal(a.view(torch.uint8), b.view(torch.uint8))


def needs_memory(size: int) -> None:
    """Skips a test where fewer than ``size`` bytes are free."""
    free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if Path("/proc/meminfo").is_file():  # memory that caches would give back counts as free
        found = re.search(r"MemAvailable: +(\d+) kB", Path("/proc/meminfo").read_text())
        free = int(found[1]) * 1024 if found else free
    if free < size:
        pytest.skip(f"needs {size / 2**30:.0f} GiB of memory, {free / 2**30:.0f} are free")


def differing(a: Tensor, b: Tensor) -> str:
    """Where two tensors differ, for a failure's message."""
    if a.dtype != b.dtype or a.shape != b.shape:
        return f"{a.dtype} {tuple(a.shape)} against {b.dtype} {tuple(b.shape)}"
    a, b = a.contiguous().view(-1), b.contiguous().view(-1)
    size = a.element_size()
    bad = (a.view(torch.uint8) != b.view(torch.uint8)).view(-1, size).any(1).nonzero().view(-1)
    if not len(bad):
        return "equal"
    first = int(bad[0])
    return f"{len(bad)} of {len(a)} elements, first {first}: {a[first]!r} against {b[first]!r}"


def base_values(numel: int, dtype: torch.dtype, generator: torch.Generator) -> Tensor:
    """Even elements on a grid of 1/64 in [-2, 2] (exact in every dtype), odd ones arbitrary."""
    grid = torch.randint(-128, 129, (numel,), generator=generator) / 64
    smooth = torch.randn(numel, generator=generator)
    return torch.where(torch.arange(numel) % 2 == 0, grid, smooth).to(dtype)


def model_values(base: Tensor, dtype: torch.dtype, generator: torch.Generator) -> Tensor:
    """A fine-tune of a base tensor: small steps that tie often, and special values."""
    numel = base.numel()
    wide = base.float()
    steps = torch.randint(-3, 4, (numel,), generator=generator) / 64
    smooth = 0.01 * torch.randn(numel, generator=generator)
    on_grid = torch.arange(numel) % 2 == 0
    model = (wide + torch.where(on_grid, steps, smooth)).to(dtype)
    smallest = _SMALLEST[dtype]
    special = torch.tensor([0.0, -0.0, smallest, -smallest, 3 * smallest, -3 * smallest], dtype=F32)
    drawn = special[torch.randint(0, 6, (numel,), generator=generator)].to(dtype)
    return torch.where(is_special(numel), drawn, model)


def is_special(numel: int) -> Tensor:
    """Elements whose base is ±0 and whose fine-tuned values are zeros and subnormals."""
    return torch.arange(numel) % 5 == 3


@dataclass
class Case:
    """Arguments for all operators: ``tasks`` models to unify, one to absorb, two to merge with."""

    numels: list[int]
    tasks: int
    base: list[Tensor]
    models: list[list[Tensor]]  # tasks + 3
    rescalers: Tensor  # [tasks + 3, tensors]
    state: torch.dtype
    zero_sum: int
    via: list[int] = field(default_factory=list)
    outs: list[torch.dtype] = field(default_factory=lambda: [F32])


def make_case(
    numels: Sequence[int],
    tasks: int,
    kind: str,
    state: torch.dtype = F32,
    zero_sum: int = 0,
    seed: int = 0,
    place: Callable[[Tensor], Tensor] = lambda tensor: tensor,
) -> Case:
    """``kind`` names DTYPES; ``place`` moves an input to where it should lie in memory."""
    generator = torch.Generator().manual_seed(seed)
    dtypes = DTYPES[kind]
    base = []
    for k, numel in enumerate(numels):
        values = base_values(numel, dtypes[k % len(dtypes)], generator)
        values[is_special(numel)] = -0.0 if k % 2 else 0.0
        base.append(values)
    models = [
        [model_values(b, dtypes[(k + t) % len(dtypes)], generator) for k, b in enumerate(base)]
        for t in range(tasks + 3)
    ]
    rescalers = 0.3 + 1.4 * torch.rand(tasks + 3, len(numels), generator=generator)
    rescalers[::4] = 1.0
    return Case(
        list(numels),
        tasks,
        [place(t) for t in base],
        [[place(t) for t in model] for model in models],
        rescalers,
        state,
        zero_sum,
        outs=dtypes,
    )


def guarded(numel: int, dtype: torch.dtype, shift: int = 16) -> tuple[Tensor, Tensor]:
    """A buffer of sevens and a view of ``numel`` NaNs in it, ``shift`` elements from its start."""
    buffer = torch.full((numel + shift + 16,), 7.0, dtype=dtype)
    view = buffer[shift : shift + numel]
    view.fill_(torch.nan)
    return buffer, view


def run(ops: ModuleType | Any, case: Case) -> dict[str, Tensor]:
    """Every operator once; name → result. Whole arenas and guard zones are part of the results."""
    T, base, via, lam = case.tasks, case.base, case.via, case.rescalers
    results: dict[str, Tensor] = {}

    def put(name: str, *tensors: Tensor) -> None:
        results.update({f"{name}[{k}]": t.clone() for k, t in enumerate(tensors)})

    flat = [t for model in case.models[:T] for t in model]
    u, planes, sums = ops.unify(flat, base, T, case.zero_sum, case.state, via)
    put("unify.u", u)
    put("unify.plane", *planes)
    put("unify.sums", sums)
    put("unify_deltas.u", ops.unify(flat, [], T, case.zero_sum, case.state, [])[0])

    new = case.models[T]
    rule = (case.zero_sum, via)
    absorbed = ops.absorb(u, planes, lam[:T], new, base, *rule)
    put("absorb.u", absorbed[0])
    put("absorb.plane", *absorbed[1])
    put("absorb.sums", absorbed[2])
    put("absorb.old", u, *planes)
    mine, my_planes = u.clone(), [p.clone() for p in planes]
    added = torch.full_like(planes[0], 0xA5)
    put("absorb_.sums", ops.absorb_(mine, my_planes, added, lam[:T], new, base, *rule))
    put("absorb_.u", mine)
    put("absorb_.plane", *my_planes, added)

    others = [t for model in case.models[T + 1 :] for t in model]
    v, v_planes, _ = ops.unify(others, base, 2, case.zero_sum, case.state, via)
    merged = ops.merge(u, planes, lam[:T], v, v_planes, lam[T + 1 :], case.numels, case.zero_sum)
    put("merge.u", merged[0])
    put("merge.plane", *merged[1])
    put("merge.sums", merged[2])

    for shift, start, name in ((16, base, "decouple_"), (17, [], "decouple_deltas_")):
        outs = [guarded(n, case.outs[k % len(case.outs)], shift) for k, n in enumerate(case.numels)]
        ops.decouple_(
            [view for _, view in outs], u, planes[-1], lam[T - 1], start, via if start else []
        )
        put(name, *(buffer for buffer, _ in outs))
    put("measure.sums", ops.measure(new, base, via))
    return results


def digests(results: dict[str, Tensor]) -> dict[str, str]:
    """A digest of each result's bytes."""
    return {
        name: hashlib.sha256(
            tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes()
        ).hexdigest()
        for name, tensor in results.items()
    }
