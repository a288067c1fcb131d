"""From a checked model to a call of the kernels: which back end, which flat tensors, which mode."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from condu_ext import _C, _cuda, _ops, reference
from condu_ext.inputs import Model, resolve
from condu_ext.layout import Arena, ModelSpec

ZERO_SUM_CODES = {"negative": 0, "positive": 1, "zero": 2}


def kernels_for(backend: str | None, device: torch.device) -> Any:
    """The module whose functions compute on a device.

    ``None`` means the kernels of the device's type, and plain PyTorch on a GPU for which none were
    compiled.

    Raises:
        ValueError: an unknown back end, one for another device, or a device without kernels.
        RuntimeError: ``backend="cuda"``, but no kernels were compiled that run on this GPU.
    """
    chosen = backend or device.type
    if chosen == "reference":
        return reference
    if chosen not in ("cpu", "cuda"):
        raise ValueError(
            f"backend must be None, 'cpu', 'cuda' or 'reference', not {backend!r}"
            if backend
            else f"there are no kernels for {device}; backend='reference' runs plain PyTorch there"
        )
    if chosen != device.type:
        raise ValueError(f"backend={backend!r}, but the tensors are on {device}")
    if chosen == "cuda" and not (_C.cuda_archs and _cuda.runs_on(device)):
        if backend is None:
            return reference
        compiled = f"for {_C.cuda_archs}" if _C.cuda_archs else "not at all"
        raise RuntimeError(
            f"backend='cuda': no CUDA kernels for {device} (compiled {compiled}); rebuild with "
            "CONDU_CUDA=1, or use backend=None, which runs plain PyTorch here"
        )
    return _ops


class Sources:
    """The local parts of one model (or delta) resolved against a spec, to be had flat in the order
    of an arena."""

    def __init__(self, spec: ModelSpec, tensors: list[Tensor | None]) -> None:
        self.spec, self.tensors = spec, tensors

    def flat(
        self, arena_index: Iterable[int], fallback: Sources | None, device: torch.device
    ) -> list[Tensor]:
        """Flat tensors; a missing one is the base's own (no change), or zeros without a base."""
        result = []
        for k in arena_index:
            entry, tensor = self.spec.tensors[k], self.tensors[k]
            if tensor is None and fallback is not None:
                tensor = fallback.tensors[k]
                if tensor is not None and entry.via:
                    tensor = tensor.to(entry.via)
            if tensor is None:
                tensor = torch.zeros(entry.local_shape, dtype=torch.float32, device=device)
            result.append(entry.flatten(tensor))
        return result

    def via(self, arena_index: Iterable[int]) -> list[int]:
        """The operators' rounding codes, or none at all."""
        codes = [reference.VIA_DTYPES.index(self.spec.tensors[k].via) for k in arena_index]
        return codes if any(codes) else []


def read_base(spec: ModelSpec, pretrained: Model | None) -> list[Tensor | None]:
    if pretrained is None:
        return [None] * len(spec.tensors)
    return resolve(spec, "pretrained", pretrained, "error")


def tensor_names(spec: ModelSpec, arena: Arena) -> list[str]:
    return [spec.tensors[k].name for k in arena.index]
