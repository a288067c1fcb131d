"""The kernels on CUDA: tensors in, device addresses to ``condu_ext._C``, tensors out.

The counterpart of :mod:`condu_ext._native`: same functions, arguments and rows of sums. Work is
queued on the device's current stream and nothing waits for it, so a CUDA graph can capture every
function here once it was called with the same tensors (:mod:`condu_ext._tables`). A graph goes on
reading the state's tensors of its capture: capture again after ``absorb_`` or ``drop``.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from condu_ext import _C, _tables
from condu_ext import _arguments as arguments
from condu_ext.layout import offsets

_CAPTURED: list[Tensor] = []
"""What captured graphs read: a replay after a state changed must not meet freed memory."""


@lru_cache
def runs_on(device: torch.device) -> bool:
    """Whether the compiled kernels can run on a device: there is code for its architecture, or code
    of an older one that its driver can translate; and the driver is not older than the runtime that
    they are linked with, which need not be torch's."""
    covered = _covers(_C.cuda_archs, *torch.cuda.get_device_capability(device))
    return covered and _C.cuda_devices() > 0


def _covers(compiled: str, major: int, minor: int) -> bool:
    """``compiled`` lists architectures, e.g. "80,90"; the last is there as PTX, too. One with a
    letter ("90a", "100f") is good for nothing but its own number, or family."""
    archs = [arch for arch in compiled.split(",") if arch]
    for arch in archs:
        a, b = divmod(int(arch.rstrip("af")), 10)
        exact = arch.endswith("a")
        if a == major and (b == minor if exact else b <= minor):
            return True
        if arch == archs[-1] and arch.isdigit() and (a, b) <= (major, minor):
            return True
    return False


def _stream(device: torch.device) -> int:
    return int(torch.cuda.current_stream(device).cuda_stream)


class _Call:
    """One call of an operation: its table, its sums, its workspace."""

    def __init__(
        self,
        numels: Sequence[int],
        models: Sequence[Tensor],
        base: Sequence[Tensor],
        via: Sequence[int],
        device: torch.device,
        rows: int,
        planes: int,
    ) -> None:
        if base:
            arguments.check_same_sizes(numels, base, "the base model")
        count = len(models) // len(numels) if numels else 0
        shape = (count + bool(base), len(numels))
        pointers = arguments.addresses([*models, *base], device).reshape(shape)
        codes = np.concatenate([arguments.dtype_codes(models), arguments.dtype_codes(base, via)])
        table = _tables.TABLES.get(device, numels, pointers, codes.reshape(shape))
        self.work, self.has_base = table.work, bool(base)
        self._table = table  # its memory, should the cache drop it before the launch
        self.sums = torch.empty(rows, table.chunks, dtype=torch.float64, device=device)
        size = _C.cuda_workspace(table.chunks, rows, planes)
        # Freed when the call returns; memory that the stream still uses goes to later work on it.
        self._workspace = torch.empty(size, dtype=torch.uint8, device=device)
        self.place = _C.Place(device.index or 0, _stream(device), self._workspace.data_ptr())


def _state(u: Tensor, planes: Sequence[Tensor], rescaler: Tensor) -> _C.State:
    pointers = arguments.addresses([u, rescaler, *planes], u.device)
    for tensor in (u, *planes):
        if tensor.data_ptr() % _tables.VECTOR:
            raise ValueError(
                f"an arena on CUDA starts on a {_tables.VECTOR}-byte boundary, but one of shape "
                f"{tuple(tensor.shape)} and dtype {tensor.dtype} does not"
            )
    if _tables.is_capturing(u.device):
        _CAPTURED.extend((u, rescaler, *planes))
    return _C.State(int(pointers[0]), arguments.state_code(u.dtype), pointers[2:], int(pointers[1]))


def unify(
    models: Sequence[Tensor],
    base: Sequence[Tensor],
    tasks: int,
    zero_sum: int,
    dtype: torch.dtype,
    via: Sequence[int],
) -> tuple[Tensor, list[Tensor], Tensor]:
    numels = arguments.numels_of(models, tasks)
    code, device = arguments.state_code(dtype), models[0].device
    arguments.check_zero_sum(zero_sum)
    call = _Call(numels, models, base, via, device, rows=2 * tasks, planes=tasks)
    u, planes = arguments.new_arena(offsets(numels)[1], tasks, dtype, device)
    _C.cuda_unify(
        call.place,
        call.work,
        tasks,
        call.has_base,
        zero_sum,
        u.data_ptr(),
        code,
        arguments.addresses(planes, device),
        call.sums.data_ptr(),
    )
    return u, planes, call.sums


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
    arguments.check_arena(numels, old_u, [*old_planes, *planes])
    arguments.check_zero_sum(zero_sum)
    table = arguments.table_of(rescaler, len(old_planes), len(numels))
    old = _state(old_u, old_planes, table)
    written = arguments.addresses([u, *planes], old_u.device)
    call = _Call(
        numels,
        model,
        base,
        via,
        old_u.device,
        rows=len(old_planes) + 2,
        planes=len(old_planes) + len(planes),
    )
    _C.cuda_absorb(
        call.place,
        call.work,
        old,
        call.has_base,
        zero_sum,
        int(written[0]),
        written[1:],
        call.sums.data_ptr(),
    )
    return call.sums


def absorb(
    u: Tensor,
    planes: Sequence[Tensor],
    rescaler: Tensor,
    model: Sequence[Tensor],
    base: Sequence[Tensor],
    zero_sum: int,
    via: Sequence[int],
) -> tuple[Tensor, list[Tensor], Tensor]:
    new_u, new_planes = arguments.new_arena(u.numel(), len(planes) + 1, u.dtype, u.device)
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
    arguments.check_same_dtype(u_a, u_b)
    arguments.check_arena(numels, u_a, planes_a)
    arguments.check_arena(numels, u_b, planes_b)
    arguments.check_zero_sum(zero_sum)
    device, tasks = u_a.device, len(planes_a) + len(planes_b)
    table_a = arguments.table_of(rescaler_a, len(planes_a), len(numels))
    table_b = arguments.table_of(rescaler_b, len(planes_b), len(numels))
    a, b = _state(u_a, planes_a, table_a), _state(u_b, planes_b, table_b)
    u, planes = arguments.new_arena(u_a.numel(), tasks, u_a.dtype, device)
    call = _Call(numels, [], [], [], device, rows=tasks, planes=2 * tasks)
    _C.cuda_merge(
        call.place,
        call.work,
        a,
        b,
        zero_sum,
        u.data_ptr(),
        arguments.addresses(planes, device),
        call.sums.data_ptr(),
    )
    return u, planes, call.sums


def decouple_(
    out: Sequence[Tensor],
    u: Tensor,
    plane: Tensor,
    rescaler: Tensor,
    base: Sequence[Tensor],
    via: Sequence[int],
) -> None:
    numels = [t.numel() for t in out]
    arguments.check_arena(numels, u, [plane])
    table = arguments.table_of(rescaler, 1, len(numels))
    expert = _state(u, [plane], table)
    call = _Call(numels, out, base, via, u.device, rows=0, planes=0)
    _C.cuda_decouple(call.place, call.work, expert, call.has_base)


def measure(model: Sequence[Tensor], base: Sequence[Tensor], via: Sequence[int]) -> Tensor:
    numels = [t.numel() for t in model]
    call = _Call(numels, model, base, via, model[0].device, rows=1, planes=0)
    _C.cuda_measure(call.place, call.work, call.has_base, call.sums.data_ptr())
    return call.sums
