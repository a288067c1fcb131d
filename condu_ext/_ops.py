"""The kernels as PyTorch operators ``torch.ops.condu.*``: schema, fakes, kernels.

They work on flat, contiguous tensors and arenas (:mod:`condu_ext.layout`) and are what
``torch.compile(fullgraph=True)`` sees; the API by name is :mod:`condu_ext.fusion`. Inputs and
outputs must not share memory, except where the schema says that an argument is written.

``models`` and ``base`` are lists of tensors of float32, bfloat16 or float16; an empty ``base``
means that the models already are deltas. ``zero_sum`` is 0, 1, 2 for FusionRule's negative,
positive, zero. ``via`` rounds base tensor k through bfloat16 (1) or float16 (2); empty: none is.
Sums are chunk sums, float64 [rows, chunks]; each operator's rows are given in
:mod:`condu_ext.reference`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.library import Library

from condu_ext import _cuda, _native
from condu_ext._register import register
from condu_ext.layout import chunk_count, offsets

_LIBRARY = Library("condu", "DEF")

_SCHEMAS = {
    "unify": "(Tensor[] models, Tensor[] base, int tasks, int zero_sum, ScalarType dtype,"
    " int[] via) -> (Tensor, Tensor[], Tensor)",
    "absorb": "(Tensor u, Tensor[] planes, Tensor rescaler, Tensor[] model, Tensor[] base,"
    " int zero_sum, int[] via) -> (Tensor, Tensor[], Tensor)",
    "absorb_": "(Tensor(a!) u, Tensor(b!)[] planes, Tensor(c!) new_plane, Tensor rescaler,"
    " Tensor[] model, Tensor[] base, int zero_sum, int[] via) -> Tensor",
    "merge": "(Tensor u_a, Tensor[] planes_a, Tensor rescaler_a, Tensor u_b, Tensor[] planes_b,"
    " Tensor rescaler_b, int[] numels, int zero_sum) -> (Tensor, Tensor[], Tensor)",
    "decouple_": "(Tensor(a!)[] out, Tensor u, Tensor plane, Tensor rescaler, Tensor[] base,"
    " int[] via) -> ()",
    "measure": "(Tensor[] model, Tensor[] base, int[] via) -> Tensor",
}


def _fake_state(
    like: Tensor, numels: Sequence[int], tasks: int, rows: int, dtype: torch.dtype
) -> tuple[Tensor, list[Tensor], Tensor]:
    size = offsets(numels)[1]
    planes = [like.new_empty(size // 8, dtype=torch.uint8) for _ in range(tasks)]
    sums = like.new_empty(rows, chunk_count(numels), dtype=torch.float64)
    return like.new_empty(size, dtype=dtype), planes, sums


def _fake_unify(
    models: Sequence[Tensor],
    base: Sequence[Tensor],
    tasks: int,
    zero_sum: int,
    dtype: torch.dtype,
    via: Sequence[int],
) -> tuple[Tensor, list[Tensor], Tensor]:
    numels = [t.numel() for t in models[: len(models) // tasks]]
    return _fake_state(models[0], numels, tasks, 2 * tasks, dtype)


def _fake_absorb(
    u: Tensor, planes: Sequence[Tensor], rescaler: Tensor, model: Sequence[Tensor], *_: Any
) -> tuple[Tensor, list[Tensor], Tensor]:
    numels = [t.numel() for t in model]
    return _fake_state(u, numels, len(planes) + 1, len(planes) + 2, u.dtype)


def _fake_absorb_(
    u: Tensor,
    planes: Sequence[Tensor],
    new_plane: Tensor,
    rescaler: Tensor,
    model: Sequence[Tensor],
    *_: Any,
) -> Tensor:
    chunks = chunk_count([t.numel() for t in model])
    return u.new_empty(len(planes) + 2, chunks, dtype=torch.float64)


def _fake_merge(
    u_a: Tensor,
    planes_a: Sequence[Tensor],
    rescaler_a: Tensor,
    u_b: Tensor,
    planes_b: Sequence[Tensor],
    rescaler_b: Tensor,
    numels: Sequence[int],
    zero_sum: int,
) -> tuple[Tensor, list[Tensor], Tensor]:
    tasks = len(planes_a) + len(planes_b)
    return _fake_state(u_a, numels, tasks, tasks, u_a.dtype)


def _fake_decouple_(*_: Any) -> None:
    return None


def _fake_measure(model: Sequence[Tensor], *_: Any) -> Tensor:
    return model[0].new_empty(1, chunk_count([t.numel() for t in model]), dtype=torch.float64)


_FAKES: dict[str, Callable[..., Any]] = {
    "unify": _fake_unify,
    "absorb": _fake_absorb,
    "absorb_": _fake_absorb_,
    "merge": _fake_merge,
    "decouple_": _fake_decouple_,
    "measure": _fake_measure,
}

register(_LIBRARY, _SCHEMAS, _FAKES, _native, _cuda)

unify = torch.ops.condu.unify.default
absorb = torch.ops.condu.absorb.default
absorb_ = torch.ops.condu.absorb_.default
merge = torch.ops.condu.merge.default
decouple_ = torch.ops.condu.decouple_.default
measure = torch.ops.condu.measure.default
