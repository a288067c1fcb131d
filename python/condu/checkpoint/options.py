"""How checkpoints are fused: what the commands and the Python calls have in common."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, field

import torch

GIB = 1 << 30

Report = Callable[[str], None]


@dataclass(frozen=True)
class Options:
    """How to read, match and fuse checkpoints; what comes out depends on ``match_dtype`` and
    ``on_mismatch`` alone.

    Attributes:
        max_memory: bytes of memory that the process may take in all, pages of mapped files apart.
        device: where ranges are fused: ``"cpu"``, ``"cuda"``, or a certain GPU.
        match_dtype: round θ_0 to a fine-tuned model's narrower dtype first (otherwise refused).
        on_mismatch: what becomes of a tensor that a fine-tuned model lacks, has in another shape,
            or has beside the base's: ``"error"``, or ``"skip"`` to take it as not fine-tuned.
        allow_pickle: read .bin and .pt files and distributed checkpoints (restricted unpickler).
        workers: threads that each read, fuse and write.
        report: called with a line for what the user should know; nothing by default.
        progress: called with the bytes that were read and written since the last call, and before
            the first of these with ``total``, all that will be.
    """

    max_memory: int = 2 * GIB
    device: str | torch.device = "cpu"
    match_dtype: bool = False
    on_mismatch: str = "error"
    allow_pickle: bool = False
    workers: int = field(default_factory=lambda: max(2, min(8, os.cpu_count() or 2)))
    report: Report = lambda line: None
    progress: Callable[[int, int], None] = lambda done, total: None

    def __post_init__(self) -> None:
        if self.on_mismatch not in ("error", "skip"):
            raise ValueError(f"on_mismatch must be 'error' or 'skip', not {self.on_mismatch!r}")
        try:
            kind = torch.device(self.device).type
        except (RuntimeError, TypeError):  # no name of a device
            kind = ""
        if kind not in ("cpu", "cuda"):
            raise ValueError(f"device must be 'cpu' or 'cuda', not {self.device!r}")
        for name in ("max_memory", "workers"):
            if type(value := getattr(self, name)) is not int or value < 1:
                raise ValueError(f"{name} must be a positive whole number, not {value!r}")
