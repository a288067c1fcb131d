"""Adapters for the tests of aligned merging, their NumPy specification, and digests of the results.

Run as a script in a process with ``CONDU_CPU_ISA`` set, it prints what that instruction set
computes, as JSON.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from kernel_cases import BF16, DTYPES, EDGES, F16, F32, SMALL, digests
from numpy.typing import NDArray
from torch import Tensor

import condu_ext as cx

Adapter = dict[str, Tensor]
_TINY = {F32: 2.0**-149, BF16: 2.0**-133, F16: 2.0**-24}


def awkward(numel: int, dtype: torch.dtype, generator: torch.Generator) -> Tensor:
    """Arbitrary values, values of a coarse grid that tie, zeros of both signs, subnormals, and the
    extremes of the dtype."""
    smooth = torch.randn(numel, generator=generator)
    grid = torch.randint(-4, 5, (numel,), generator=generator) / 4
    largest = torch.finfo(dtype).max
    special = torch.tensor([0.0, -0.0, *(s * _TINY[dtype] * k for s in (1, -1) for k in (1, 2, 9))])
    special = torch.cat([special, torch.tensor([largest, -largest])])
    drawn = special[torch.randint(0, len(special), (numel,), generator=generator)]
    kind = torch.arange(numel) % 5
    return torch.where(kind < 2, smooth, torch.where(kind < 4, grid, drawn)).to(dtype)


def adapter(
    sizes: Sequence[int], kind: str | Sequence[torch.dtype], seed: int = 0, first: int = 0
) -> Adapter:
    """``kind`` names DTYPES or lists dtypes, which the tensors take in turn from ``first`` on."""
    generator = torch.Generator().manual_seed(seed)
    dtypes = DTYPES[kind] if isinstance(kind, str) else kind
    return {
        f"t{k}": awkward(n, dtypes[(k + first) % len(dtypes)], generator)
        for k, n in enumerate(sizes)
    }


def copy_of(tensors: Adapter) -> Adapter:
    return {name: t.detach().clone() for name, t in tensors.items()}


def wide(tensor: Tensor) -> NDArray[np.float64]:
    return tensor.detach().double().numpy()


def threshold_of(values: NDArray[np.float64], rank: int) -> float:
    """The rank-th largest magnitude, by sorting."""
    return float(np.sort(np.abs(values.reshape(-1)))[::-1][rank - 1])


def conflicts_of(
    w: NDArray[np.float64], g: NDArray[np.float64], threshold: float
) -> NDArray[np.bool_]:
    """|g| ≥ τ and g·w < 0, by signs."""
    return (np.abs(g) >= threshold) & (np.sign(g) * np.sign(w) < 0)


def average_of(g: Tensor, w: Tensor, weight: float) -> Tensor:
    """Every rounding of average_, one at a time, in NumPy."""
    a, b = np.float32(weight), np.float32(1.0 - weight)
    kept, added = g.float().numpy() * a, w.float().numpy() * b
    assert kept.dtype == added.dtype == np.float32
    return torch.empty_like(g).copy_(torch.from_numpy(kept + added))


def computed() -> dict[str, Tensor]:
    """Everything that the kernels give for adapters that reach all of their loops."""
    results: dict[str, Tensor] = {}
    for kind, first in [("fp32", 0), ("bf16", 0), ("fp16", 0), *(("mixed", k) for k in range(3))]:
        sizes = [*SMALL, *EDGES, 300_000]
        g, w = adapter(sizes, kind, 1), adapter(sizes, kind, 2, first)
        for scope in ("tensor", "global"):
            threshold = cx.magnitude_threshold(g, 0.3, scope)
            for to in ("zero", "global"):
                aligned = copy_of(w)
                fraction = cx.align_(aligned, g, threshold, to)
                label = f"{kind} {first} {scope} {to}"
                results |= {f"{label} {name}": t for name, t in aligned.items()}
                results[f"{label} fraction"] = fraction
            results |= {f"{kind} {scope} {name}": t for name, t in threshold.items()}
        averaged = copy_of(g)
        cx.average_(averaged, w, 0.3)
        results |= {f"{kind} {first} average {name}": t for name, t in averaged.items()}
    return results


def main() -> None:
    found: dict[str, Any] = {"isa": cx.build_info()["cpu_isa"], "digests": digests(computed())}
    print(json.dumps(found))


if __name__ == "__main__":
    main()
