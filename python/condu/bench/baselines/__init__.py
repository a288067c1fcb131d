"""The same operations in PyTorch alone, three ways, to hold the kernels against.

`straightforward` is the formulation of the public codes, `eager` the best that we could write
without kernels, `compile` the formulas under ``torch.compile``. All compute in float32 whatever the
models' dtype and store the unified delta in the state's, so that their results can be compared with
the kernels'. PyTorch has no packed bits: masks are bool tensors, one byte an element and task, or
bits of an int32 under ``torch.compile``.
"""

from __future__ import annotations

from condu.bench.baselines.base import Baseline, Triggered
from condu.bench.baselines.compiled import Compiled
from condu.bench.baselines.eager import Eager
from condu.bench.baselines.straightforward import Straightforward

BASELINES: dict[str, Baseline] = {
    "straightforward": Straightforward(),
    "eager": Eager(),
    "compile": Compiled(),
}

__all__ = ["BASELINES", "Baseline", "Triggered"]
