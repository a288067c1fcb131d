"""condu_ext: fuse fine-tuned models at the tensor level, in one pass over memory.

>>> state = unify({"aircraft": sd_a, "dtd": sd_d}, pretrained)
>>> state = absorb(state, "eurosat", finetuned, pretrained)
>>> theta = decouple(state, "dtd", pretrained)
"""

from __future__ import annotations

from typing import Any

import torch

from condu_ext import _C
from condu_ext.alignment import align_, average_, magnitude_threshold
from condu_ext.decoupling import decouple, decouple_
from condu_ext.fusion import absorb, absorb_, unify
from condu_ext.merging import merge
from condu_ext.rule import FusionRule
from condu_ext.unified import UnifiedDelta

__version__ = _C.version

__all__ = [
    "FusionRule",
    "UnifiedDelta",
    "absorb",
    "absorb_",
    "align_",
    "average_",
    "build_info",
    "decouple",
    "decouple_",
    "magnitude_threshold",
    "merge",
    "unify",
]


def build_info() -> dict[str, Any]:
    """What was compiled and what is used here.

    Returns:
        version; cuda_archs (compiled, empty without CUDA); cuda_devices (visible now); cpu_isa
        (in use; ``CONDU_CPU_ISA`` forces one); openmp; threads (``torch.get_num_threads()``).
    """
    return {
        "version": _C.version,
        "cuda_archs": [arch for arch in _C.cuda_archs.split(",") if arch],
        "cuda_devices": _C.cuda_devices(),
        "cpu_isa": _C.cpu_isa(),
        "openmp": _C.openmp,
        "threads": torch.get_num_threads(),
    }
