"""The kernels on the CPU: tensors in, addresses to ``condu_ext._C``, tensors out.

The functions have the signatures of the registered operators (:mod:`condu_ext._ops`), which are
their only callers: an operator's implementation sees real tensors, never fake ones. Tensors must
be contiguous; their memory may have any alignment.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from condu_ext import _C
from condu_ext.layout import offsets

# condu_dtype of csrc/condu_ext.h, by storage dtype and the operators' `via` code.
_DTYPE_CODES = {
    (torch.float32, 0): 0,
    (torch.bfloat16, 0): 1,
    (torch.float16, 0): 2,
    (torch.float32, 1): 3,
    (torch.float32, 2): 4,
    (torch.bfloat16, 2): 5,
    (torch.float16, 1): 6,
}


def _addresses(tensors: Sequence[Tensor]) -> NDArray[np.uint64]:
    for tensor in tensors:
        if not tensor.is_contiguous() or tensor.device.type != "cpu":
            raise ValueError(
                "the CPU kernels take contiguous CPU tensors, not one of shape "
                f"{tuple(tensor.shape)}, stride {tensor.stride()} on {tensor.device}"
            )
    return np.array([tensor.data_ptr() for tensor in tensors], dtype=np.uint64)


def _dtypes(tensors: Sequence[Tensor], via: Sequence[int] = ()) -> NDArray[np.uint8]:
    codes = via or [0] * len(tensors)
    try:
        return np.array(
            [_DTYPE_CODES[t.dtype, code] for t, code in zip(tensors, codes, strict=True)],
            dtype=np.uint8,
        )
    except KeyError as error:
        raise TypeError(f"the kernels take float32, bfloat16 and float16, not {error}") from None


def _state_code(dtype: torch.dtype) -> int:
    if dtype not in (torch.float32, torch.bfloat16):
        raise TypeError(f"a unified delta is float32 or bfloat16, not {dtype}")
    return _DTYPE_CODES[dtype, 0]


def _check_zero_sum(zero_sum: int) -> int:
    if zero_sum not in (0, 1, 2):
        raise ValueError(f"zero_sum is 0 (negative), 1 (positive) or 2 (zero), not {zero_sum}")
    return zero_sum


def _layout(numels: Sequence[int]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    return np.array(numels, dtype=np.int64), np.array(offsets(numels)[0], dtype=np.int64)


def _check_same_sizes(numels: Sequence[int], tensors: Sequence[Tensor], what: str) -> None:
    sizes = [t.numel() for t in tensors]
    if sizes != list(numels):
        raise ValueError(f"{what} has tensors of {sizes} elements, expected {list(numels)}")


def _check_arena(numels: Sequence[int], u: Tensor, planes: Sequence[Tensor]) -> None:
    size = offsets(numels)[1]
    if u.numel() != size or any(p.numel() != size // 8 for p in planes):
        raise ValueError(
            f"arena of {u.numel()} elements with planes of {[p.numel() for p in planes]} bytes, "
            f"expected {size} and {size // 8}"
        )
    if any(p.dtype != torch.uint8 for p in planes):
        raise TypeError("planes are uint8")


def _table(rescaler: Tensor, tasks: int, tensors: int) -> NDArray[np.float32]:
    if rescaler.dtype != torch.float32 or rescaler.numel() != tasks * tensors:
        raise ValueError(
            f"rescaler is {rescaler.dtype} {tuple(rescaler.shape)}, "
            f"expected float32 ({tasks}, {tensors})"
        )
    return rescaler.contiguous().numpy().reshape(-1)


def _base(
    base: Sequence[Tensor], via: Sequence[int], numels: Sequence[int]
) -> tuple[NDArray[np.uint64] | None, NDArray[np.uint8] | None]:
    if not base and len(numels):
        return None, None
    _check_same_sizes(numels, base, "the base model")
    return _addresses(base), _dtypes(base, via)


def _new_arena(size: int, tasks: int, dtype: torch.dtype) -> tuple[Tensor, list[Tensor]]:
    planes = [torch.empty(size // 8, dtype=torch.uint8, device="cpu") for _ in range(tasks)]
    return torch.empty(size, dtype=dtype, device="cpu"), planes


def unify(
    models: Sequence[Tensor],
    base: Sequence[Tensor],
    tasks: int,
    zero_sum: int,
    dtype: torch.dtype,
    via: Sequence[int],
) -> tuple[Tensor, list[Tensor], Tensor]:
    if tasks < 1 or len(models) % tasks:
        raise ValueError(f"{len(models)} tensors are not {tasks} models")
    numels = [t.numel() for t in models[: len(models) // tasks]]
    _check_same_sizes(numels * tasks, models, "a model")
    u, planes = _new_arena(offsets(numels)[1], tasks, dtype)
    shape = (tasks, len(numels))
    num, den = _C.unify(
        *_layout(numels),
        _addresses(models).reshape(shape),
        _dtypes(models).reshape(shape),
        *_base(base, via, numels),
        _check_zero_sum(zero_sum),
        u.data_ptr(),
        _state_code(dtype),
        _addresses(planes),
        torch.get_num_threads(),
    )
    return u, planes, torch.from_numpy(np.concatenate([num, den]))


def _absorb_into(
    old_u: Tensor,
    old_planes: Sequence[Tensor],
    rescaler: Tensor,
    model: Sequence[Tensor],
    base: Sequence[Tensor],
    zero_sum: int,
    via: Sequence[int],
    u: Tensor,
    planes: Sequence[Tensor],
) -> Tensor:
    numels = [t.numel() for t in model]
    _check_arena(numels, old_u, [*old_planes, *planes])
    num, den = _C.absorb(
        *_layout(numels),
        _addresses([old_u])[0],
        _state_code(old_u.dtype),
        _addresses(old_planes),
        _table(rescaler, len(old_planes), len(numels)),
        _addresses(model)[None],
        _dtypes(model)[None],
        *_base(base, via, numels),
        _check_zero_sum(zero_sum),
        u.data_ptr(),
        _addresses(planes),
        torch.get_num_threads(),
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
    new_u, new_planes = _new_arena(u.numel(), len(planes) + 1, u.dtype)
    sums = _absorb_into(u, planes, rescaler, model, base, zero_sum, via, new_u, new_planes)
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
    written = [*planes, new_plane]
    return _absorb_into(u, planes, rescaler, model, base, zero_sum, via, u, written)


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
    if u_a.dtype != u_b.dtype:
        raise ValueError(f"states of {u_a.dtype} and {u_b.dtype} do not merge")
    _check_arena(numels, u_a, planes_a)
    _check_arena(numels, u_b, planes_b)
    u, planes = _new_arena(u_a.numel(), len(planes_a) + len(planes_b), u_a.dtype)
    den = _C.merge(
        *_layout(numels),
        _addresses([u_a])[0],
        _addresses(planes_a),
        _table(rescaler_a, len(planes_a), len(numels)),
        _addresses([u_b])[0],
        _addresses(planes_b),
        _table(rescaler_b, len(planes_b), len(numels)),
        _check_zero_sum(zero_sum),
        u.data_ptr(),
        _state_code(u.dtype),
        _addresses(planes),
        torch.get_num_threads(),
    )
    return u, planes, torch.from_numpy(den)


def decouple_(
    out: Sequence[Tensor],
    u: Tensor,
    plane: Tensor,
    rescaler: Tensor,
    base: Sequence[Tensor],
    via: Sequence[int],
) -> None:
    numels = [t.numel() for t in out]
    _check_arena(numels, u, [plane])
    _C.decouple(
        *_layout(numels),
        _addresses([u])[0],
        _state_code(u.dtype),
        _addresses([plane]),
        _table(rescaler, 1, len(numels)),
        *_base(base, via, numels),
        _addresses(out)[None],
        _dtypes(out)[None],
        torch.get_num_threads(),
    )


def measure(model: Sequence[Tensor], base: Sequence[Tensor], via: Sequence[int]) -> Tensor:
    numels = [t.numel() for t in model]
    num = _C.measure(
        *_layout(numels),
        _addresses(model)[None],
        _dtypes(model)[None],
        *_base(base, via, numels),
        torch.get_num_threads(),
    )
    return torch.from_numpy(num)


def add_chunks(numels: Sequence[int], chunk_sums: Tensor) -> Tensor:
    """Adds chunk sums in chunk order: float64 [rows, tensors] from [rows, chunks]."""
    rows = np.ascontiguousarray(chunk_sums.cpu().numpy())
    return torch.from_numpy(_C.add_chunks(*_layout(numels), rows))
