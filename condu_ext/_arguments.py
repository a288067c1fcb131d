"""Checks of the operators' arguments, shared by the kernels of both devices.

What they refuse would make a kernel read or write where it must not; models by name are checked in
:mod:`condu_ext.inputs`.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

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


def addresses(tensors: Sequence[Tensor], device: torch.device) -> NDArray[np.uint64]:
    """Where contiguous tensors on ``device`` lie.

    Raises:
        ValueError: a tensor that is strided or elsewhere.
    """
    for tensor in tensors:
        if not tensor.is_contiguous() or tensor.device != device:
            raise ValueError(
                f"the kernels take contiguous tensors on {device}, not one of shape "
                f"{tuple(tensor.shape)}, stride {tensor.stride()} on {tensor.device}"
            )
    return np.array([tensor.data_ptr() for tensor in tensors], dtype=np.uint64)


def dtype_codes(tensors: Sequence[Tensor], via: Sequence[int] = ()) -> NDArray[np.uint8]:
    """The kernels' codes of dtypes, with the rounding that ``via`` asks for.

    Raises:
        TypeError: another dtype than float32, bfloat16 and float16, or an unknown rounding.
    """
    codes = via or [0] * len(tensors)
    try:
        return np.array(
            [_DTYPE_CODES[t.dtype, code] for t, code in zip(tensors, codes, strict=True)],
            dtype=np.uint8,
        )
    except KeyError as error:
        raise TypeError(f"the kernels take float32, bfloat16 and float16, not {error}") from None


def state_code(dtype: torch.dtype) -> int:
    """The kernels' code of a unified delta's dtype; TypeError for any but float32 and bfloat16."""
    if dtype not in (torch.float32, torch.bfloat16):
        raise TypeError(f"a unified delta is float32 or bfloat16, not {dtype}")
    return _DTYPE_CODES[dtype, 0]


def check_zero_sum(zero_sum: int) -> int:
    """The code itself; ValueError unless it is 0, 1 or 2."""
    if zero_sum not in (0, 1, 2):
        raise ValueError(f"zero_sum is 0 (negative), 1 (positive) or 2 (zero), not {zero_sum}")
    return zero_sum


def numels_of(models: Sequence[Tensor], tasks: int) -> list[int]:
    """Sizes of a model's tensors, from ``tasks`` models of equal sizes, else ValueError."""
    if tasks < 1 or len(models) % tasks:
        raise ValueError(f"{len(models)} tensors are not {tasks} models")
    numels = [t.numel() for t in models[: len(models) // tasks]]
    check_same_sizes(numels * tasks, models, "a model")
    return numels


def check_same_sizes(numels: Sequence[int], tensors: Sequence[Tensor], what: str) -> None:
    """ValueError unless the tensors have these sizes."""
    sizes = [t.numel() for t in tensors]
    if sizes != list(numels):
        raise ValueError(f"{what} has tensors of {sizes} elements, expected {list(numels)}")


def check_arena(numels: Sequence[int], u: Tensor, planes: Sequence[Tensor]) -> None:
    """ValueError or TypeError unless u and planes are an arena of these tensors."""
    size = offsets(numels)[1]
    if u.numel() != size or any(p.numel() != size // 8 for p in planes):
        raise ValueError(
            f"arena of {u.numel()} elements with planes of {[p.numel() for p in planes]} bytes, "
            f"expected {size} and {size // 8}"
        )
    if any(p.dtype != torch.uint8 for p in planes):
        raise TypeError("planes are uint8")


def check_same_dtype(u_a: Tensor, u_b: Tensor) -> None:
    """ValueError unless two unified deltas have the same dtype."""
    if u_a.dtype != u_b.dtype:
        raise ValueError(f"states of {u_a.dtype} and {u_b.dtype} do not mix")


def table_of(rescaler: Tensor, tasks: int, tensors: int) -> Tensor:
    """Rescalers as a contiguous float32 tensor [tasks * tensors], else ValueError."""
    if rescaler.dtype != torch.float32 or rescaler.numel() != tasks * tensors:
        raise ValueError(
            f"rescaler is {rescaler.dtype} {tuple(rescaler.shape)}, "
            f"expected float32 ({tasks}, {tensors})"
        )
    return rescaler.contiguous().view(-1)


def new_arena(
    size: int, tasks: int, dtype: torch.dtype, device: torch.device
) -> tuple[Tensor, list[Tensor]]:
    """Memory for a unified delta and the planes of ``tasks`` masks; the kernels fill it."""
    planes = [torch.empty(size // 8, dtype=torch.uint8, device=device) for _ in range(tasks)]
    return torch.empty(size, dtype=dtype, device=device), planes


def check_ranks(numels: Sequence[int], ranks: Sequence[int]) -> bool:
    """Whether the tensors are taken together: one rank for several. ValueError unless there is one
    rank a tensor, or one, each within the number of elements."""
    if len(ranks) not in (1, len(numels)):
        raise ValueError(f"{len(ranks)} ranks for {len(numels)} tensors: give one each, or one")
    joint = len(ranks) != len(numels)
    for rank, count in zip(ranks, [sum(numels)] if joint else numels, strict=True):
        if not 0 <= rank <= count:
            raise ValueError(f"rank {rank} of {count} elements")
    return joint


def check_thresholds(threshold: Tensor, tensors: int) -> Tensor:
    """Thresholds as a contiguous float32 tensor [tensors], else ValueError."""
    if threshold.dtype != torch.float32 or threshold.shape != (tensors,):
        raise ValueError(
            f"threshold is {threshold.dtype} {tuple(threshold.shape)}, "
            f"expected float32 ({tensors},)"
        )
    return threshold.contiguous()
