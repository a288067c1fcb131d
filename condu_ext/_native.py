"""The kernels on the CPU: tensors in, addresses to ``condu_ext._C``, tensors out.

Functions with the names of registered operators (:mod:`condu_ext._ops`) have their signatures and
are called by them alone: an operator's implementation sees real tensors, never fake ones. Those
named ``…_into`` write to memory of the caller's, with as many threads as it says; they also serve
:mod:`condu_ext.ranges`. Tensors must be contiguous; their memory may have any alignment.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from condu_ext import _C
from condu_ext import _arguments as arguments
from condu_ext.layout import offsets

_CPU = torch.device("cpu")


def _addresses(tensors: Sequence[Tensor]) -> NDArray[np.uint64]:
    return arguments.addresses(tensors, _CPU)


def _layout(numels: Sequence[int]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    return np.array(numels, dtype=np.int64), np.array(offsets(numels)[0], dtype=np.int64)


def _table(rescaler: Tensor, tasks: int, tensors: int) -> NDArray[np.float32]:
    return arguments.table_of(rescaler, tasks, tensors).numpy()


def _base(
    base: Sequence[Tensor], via: Sequence[int], numels: Sequence[int]
) -> tuple[NDArray[np.uint64] | None, NDArray[np.uint8] | None]:
    if not base and len(numels):
        return None, None
    arguments.check_same_sizes(numels, base, "the base model")
    return _addresses(base), arguments.dtype_codes(base, via)


def unify_into(
    models: Sequence[Tensor],
    base: Sequence[Tensor],
    tasks: int,
    zero_sum: int,
    via: Sequence[int],
    u: Tensor,
    planes: Sequence[Tensor],
    threads: int,
) -> Tensor:
    numels = arguments.numels_of(models, tasks)
    arguments.check_arena(numels, u, planes)
    shape = (tasks, len(numels))
    num, den = _C.unify(
        *_layout(numels),
        _addresses(models).reshape(shape),
        arguments.dtype_codes(models).reshape(shape),
        *_base(base, via, numels),
        arguments.check_zero_sum(zero_sum),
        _addresses([u])[0],
        arguments.state_code(u.dtype),
        _addresses(planes),
        threads,
    )
    return torch.from_numpy(np.concatenate([num, den]))


def unify(
    models: Sequence[Tensor],
    base: Sequence[Tensor],
    tasks: int,
    zero_sum: int,
    dtype: torch.dtype,
    via: Sequence[int],
) -> tuple[Tensor, list[Tensor], Tensor]:
    size = offsets(arguments.numels_of(models, tasks))[1]
    u, planes = arguments.new_arena(size, tasks, dtype, _CPU)
    threads = torch.get_num_threads()
    return u, planes, unify_into(models, base, tasks, zero_sum, via, u, planes, threads)


def absorb_into(
    old_u: Tensor,
    old_planes: Sequence[Tensor],
    rescaler: Tensor,
    model: Sequence[Tensor],
    base: Sequence[Tensor],
    zero_sum: int,
    via: Sequence[int],
    u: Tensor,
    planes: Sequence[Tensor],
    threads: int,
) -> Tensor:
    """``u`` and the old tasks' ``planes`` may be the old ones themselves."""
    numels = [t.numel() for t in model]
    arguments.check_same_dtype(old_u, u)
    arguments.check_arena(numels, old_u, old_planes)
    arguments.check_arena(numels, u, planes)
    num, den = _C.absorb(
        *_layout(numels),
        _addresses([old_u])[0],
        arguments.state_code(old_u.dtype),
        _addresses(old_planes),
        _table(rescaler, len(old_planes), len(numels)),
        _addresses(model)[None],
        arguments.dtype_codes(model)[None],
        *_base(base, via, numels),
        arguments.check_zero_sum(zero_sum),
        _addresses([u])[0],
        _addresses(planes),
        threads,
    )
    return torch.from_numpy(np.concatenate([den, num]))


def absorb(
    u: Tensor,
    planes: Sequence[Tensor],
    rescaler: Tensor,
    model: Sequence[Tensor],
    base: Sequence[Tensor],
    zero_sum: int,
    via: Sequence[int],
) -> tuple[Tensor, list[Tensor], Tensor]:
    new_u, new_planes = arguments.new_arena(u.numel(), len(planes) + 1, u.dtype, _CPU)
    written = (new_u, new_planes, torch.get_num_threads())
    sums = absorb_into(u, planes, rescaler, model, base, zero_sum, via, *written)
    return new_u, new_planes, sums


def absorb_(
    u: Tensor,
    planes: Sequence[Tensor],
    new_plane: Tensor,
    rescaler: Tensor,
    model: Sequence[Tensor],
    base: Sequence[Tensor],
    zero_sum: int,
    via: Sequence[int],
) -> Tensor:
    written = (u, [*planes, new_plane], torch.get_num_threads())
    return absorb_into(u, planes, rescaler, model, base, zero_sum, via, *written)


def merge_into(
    u_a: Tensor,
    planes_a: Sequence[Tensor],
    rescaler_a: Tensor,
    u_b: Tensor,
    planes_b: Sequence[Tensor],
    rescaler_b: Tensor,
    numels: Sequence[int],
    zero_sum: int,
    u: Tensor,
    planes: Sequence[Tensor],
    threads: int,
) -> Tensor:
    arguments.check_same_dtype(u_a, u_b)
    arguments.check_same_dtype(u_a, u)
    arguments.check_arena(numels, u_a, planes_a)
    arguments.check_arena(numels, u_b, planes_b)
    arguments.check_arena(numels, u, planes)
    den = _C.merge(
        *_layout(numels),
        _addresses([u_a])[0],
        _addresses(planes_a),
        _table(rescaler_a, len(planes_a), len(numels)),
        _addresses([u_b])[0],
        _addresses(planes_b),
        _table(rescaler_b, len(planes_b), len(numels)),
        arguments.check_zero_sum(zero_sum),
        _addresses([u])[0],
        arguments.state_code(u.dtype),
        _addresses(planes),
        threads,
    )
    return torch.from_numpy(den)


def merge(
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
    u, planes = arguments.new_arena(u_a.numel(), tasks, u_a.dtype, _CPU)
    a, b = (u_a, planes_a, rescaler_a), (u_b, planes_b, rescaler_b)
    sums = merge_into(*a, *b, numels, zero_sum, u, planes, torch.get_num_threads())
    return u, planes, sums


def decouple_into(
    out: Sequence[Tensor],
    u: Tensor,
    plane: Tensor,
    rescaler: Tensor,
    base: Sequence[Tensor],
    via: Sequence[int],
    threads: int,
) -> None:
    numels = [t.numel() for t in out]
    arguments.check_arena(numels, u, [plane])
    _C.decouple(
        *_layout(numels),
        _addresses([u])[0],
        arguments.state_code(u.dtype),
        _addresses([plane]),
        _table(rescaler, 1, len(numels)),
        *_base(base, via, numels),
        _addresses(out)[None],
        arguments.dtype_codes(out)[None],
        threads,
    )


def decouple_(
    out: Sequence[Tensor],
    u: Tensor,
    plane: Tensor,
    rescaler: Tensor,
    base: Sequence[Tensor],
    via: Sequence[int],
) -> None:
    decouple_into(out, u, plane, rescaler, base, via, torch.get_num_threads())


def measure(model: Sequence[Tensor], base: Sequence[Tensor], via: Sequence[int]) -> Tensor:
    numels = [t.numel() for t in model]
    num = _C.measure(
        *_layout(numels),
        _addresses(model)[None],
        arguments.dtype_codes(model)[None],
        *_base(base, via, numels),
        torch.get_num_threads(),
    )
    return torch.from_numpy(num)


def add_chunks(numels: Sequence[int], chunk_sums: Tensor) -> Tensor:
    """Adds chunk sums in chunk order: float64 [rows, tensors] from [rows, chunks]."""
    rows = np.ascontiguousarray(chunk_sums.cpu().numpy())
    return torch.from_numpy(_C.add_chunks(*_layout(numels), rows))
