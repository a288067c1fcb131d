"""Registers operators ``torch.ops.condu.*``: schema, fake, an implementation for each device."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import ModuleType
from typing import Any

import torch
from torch.library import Library

from condu_ext import _C

# A graph that torch.compile captures brings new addresses, for which there is no table yet.
_TAGS = tuple(t for t in (getattr(torch.Tag, "cudagraph_unsafe", None),) if t is not None)


def register(
    library: Library,
    schemas: Mapping[str, str],
    fakes: Mapping[str, Callable[..., Any]],
    cpu: ModuleType,
    cuda: ModuleType,
) -> None:
    """Define every operator of ``schemas``; ``cpu`` and ``cuda`` have functions of their names."""
    for name, schema in schemas.items():
        library.define(name + schema, tags=_TAGS)
        library.impl(name, getattr(cpu, name), "CPU")
        if _C.cuda_archs:
            library.impl(name, getattr(cuda, name), "CUDA")
        torch.library.register_fake(f"condu::{name}", fakes[name], lib=library)
