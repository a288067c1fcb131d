"""The fusion rule in plain PyTorch: the tested specification of every kernel.

The functions have the signatures of the registered operators (:mod:`condu_ext._ops`) and work on
any device. Unified delta, masks and decoupled weights are what the kernels compute, bit for bit;
chunk sums are float64 here, so rescalers may differ by rounding (at most 4 ulp of fp32).

Source: ConDU, arXiv 2503.10705; elect, take the extreme value that agrees, regenerate the masks,
rescale. ``absorb`` is decouple-then-unify with the old tasks' part of the sum factored out.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from condu_ext.layout import CHUNK, offsets

TIE_SIGN = (-1.0, 1.0, 0.0)  # what zero_sum elects: negative, positive, zero
VIA_DTYPES = (None, torch.bfloat16, torch.float16)  # meaning of the operators' `via` codes
GROUP = 4  # tasks whose rescalers are added before the groups are


def pack_bits(mask: Tensor) -> Tensor:
    """uint8 [ceil(n / 8)] from bool [n]: bit j of byte k is element 8k + j; the tail is zero."""
    padded = torch.nn.functional.pad(mask.view(torch.uint8), (0, -mask.numel() % 8)).view(-1, 8)
    weights = torch.tensor([1, 2, 4, 8, 16, 32, 64, 128], dtype=torch.uint8, device=mask.device)
    return (padded * weights).sum(1, dtype=torch.uint8)


def unpack_bits(packed: Tensor, numel: int) -> Tensor:
    """bool [numel] from :func:`pack_bits`."""
    shifts = torch.arange(8, dtype=torch.uint8, device=packed.device)
    return ((packed.view(-1, 1) >> shifts) & 1).view(-1)[:numel].bool()


def base_values(base: Sequence[Tensor], via: Sequence[int], k: int) -> Tensor | float:
    """θ_0 of tensor k in fp32, rounded through a narrower dtype if ``via`` says so; 0 if absent."""
    if not base:
        return 0.0
    narrow = VIA_DTYPES[via[k]] if via else None
    return (base[k].to(narrow) if narrow else base[k]).float()


def elect(total: Tensor, zero_sum: int) -> Tensor:
    """The elected sign: +1, -1, or 0 where nothing is elected."""
    tie = total.new_full((), TIE_SIGN[zero_sum])
    return torch.where(total > 0, 1.0, torch.where(total < 0, -1.0, tie))


def elected(best: Tensor, flag: Tensor, dtype: torch.dtype) -> Tensor:
    """flag · best in the state's dtype, +0 where nothing agreed."""
    return torch.where(best > 0, flag * best, 0.0).to(dtype)


def chunk_sums(values: Tensor) -> Tensor:
    """float64 sums of a tensor's chunks."""
    return torch.stack([chunk.sum(dtype=torch.float64) for chunk in values.split(CHUNK)])


class _Writer:
    """Collects tensors into a new arena: unified delta, planes, rows of chunk sums."""

    def __init__(self, numels: list[int], tasks: int, dtype: torch.dtype, device: torch.device):
        size = offsets(numels)[1]
        self.u = torch.zeros(size, dtype=dtype, device=device)
        self.planes = [
            torch.zeros(size // 8, dtype=torch.uint8, device=device) for _ in range(tasks)
        ]
        self.rows: list[list[Tensor]] = []

    def put(self, start: int, u: Tensor, masks: list[Tensor], rows: list[Tensor]) -> None:
        self.u[start : start + u.numel()] = u
        for plane, mask in zip(self.planes, masks, strict=True):
            packed = pack_bits(mask)
            plane[start // 8 : start // 8 + packed.numel()] = packed
        if u.numel():
            self.rows.append([chunk_sums(row) for row in rows])

    def sums(self, rows: int) -> Tensor:
        if not self.rows:
            return torch.zeros(rows, 0, dtype=torch.float64, device=self.u.device)
        return torch.stack([torch.cat(list(row)) for row in zip(*self.rows, strict=True)])


def _triggers(
    planes: Sequence[Tensor], rescaler: Tensor, k: int, start: int, u: Tensor
) -> tuple[list[Tensor], Tensor, Tensor]:
    """Masks of tensor k, and per element the sum S and the maximum X of λ_i·M_i."""
    numel = u.numel()
    masks = [unpack_bits(p[start // 8 : (start + numel + 7) // 8], numel) for p in planes]
    terms = [torch.where(m, rescaler[t, k], 0.0) for t, m in enumerate(masks)]
    total, largest = torch.zeros_like(u), torch.zeros_like(u)
    for first in range(0, len(terms), GROUP):
        total = total + sum(terms[first + 1 : first + GROUP], terms[first])
    for term in terms:
        largest = torch.maximum(largest, term)
    return masks, total, largest


def unify(
    models: Sequence[Tensor],
    base: Sequence[Tensor],
    tasks: int,
    zero_sum: int,
    dtype: torch.dtype,
    via: Sequence[int],
) -> tuple[Tensor, list[Tensor], Tensor]:
    """Unify ``tasks`` models, given task by task; chunk sums are [num of tasks, den of tasks]."""
    count = len(models) // tasks
    numels = [models[k].numel() for k in range(count)]
    out = _Writer(numels, tasks, dtype, models[0].device if count else torch.device("cpu"))
    for k, start in enumerate(offsets(numels)[0]):
        theta_0 = base_values(base, via, k)
        deltas = [models[t * count + k].float() - theta_0 for t in range(tasks)]
        total = sum(deltas[1:], deltas[0])
        flag = elect(total, zero_sum)
        masks = [d * flag > 0 for d in deltas]
        best = torch.zeros_like(total)
        for d, mask in zip(deltas, masks, strict=True):
            best = torch.maximum(best, torch.where(mask, d.abs(), 0.0))
        u = elected(best, flag, dtype)
        size = u.float().abs()
        dens = [torch.where(mask, size, 0.0) for mask in masks]
        out.put(start, u, masks, [*(d.abs() for d in deltas), *dens])
    return out.u, out.planes, out.sums(2 * tasks)


def absorb(
    u: Tensor,
    planes: Sequence[Tensor],
    rescaler: Tensor,
    model: Sequence[Tensor],
    base: Sequence[Tensor],
    zero_sum: int,
    via: Sequence[int],
) -> tuple[Tensor, list[Tensor], Tensor]:
    """Absorb one model; chunk sums are [den of old tasks, den of the new one, num of the new]."""
    numels = [t.numel() for t in model]
    out = _Writer(numels, len(planes) + 1, u.dtype, u.device)
    for k, start in enumerate(offsets(numels)[0]):
        old = u[start : start + numels[k]].float()
        masks, S, X = _triggers(planes, rescaler, k, start, old)
        d = model[k].float() - base_values(base, via, k)
        flag = elect(old * S + d, zero_sum)
        kept, joined = old * flag > 0, d * flag > 0
        best = torch.maximum(
            torch.where(kept, old.abs() * X, 0.0), torch.where(joined, d.abs(), 0.0)
        )
        new = elected(best, flag, u.dtype)
        size = new.float().abs()
        masks = [*(m & kept for m in masks), joined]
        out.put(start, new, masks, [*(torch.where(m, size, 0.0) for m in masks), d.abs()])
    return out.u, out.planes, out.sums(len(planes) + 2)


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
    """:func:`absorb` into the given memory."""
    new_u, new_planes, sums = absorb(u, planes, rescaler, model, base, zero_sum, via)
    u.copy_(new_u)
    for target, source in zip([*planes, new_plane], new_planes, strict=True):
        target.copy_(source)
    return sums


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
    """Merge two states; chunk sums are [den of a's tasks, den of b's tasks]."""
    tasks = len(planes_a) + len(planes_b)
    out = _Writer(list(numels), tasks, u_a.dtype, u_a.device)
    for k, start in enumerate(offsets(numels)[0]):
        part = slice(start, start + numels[k])
        a, b = u_a[part].float(), u_b[part].float()
        masks_a, S_a, X_a = _triggers(planes_a, rescaler_a, k, start, a)
        masks_b, S_b, X_b = _triggers(planes_b, rescaler_b, k, start, b)
        flag = elect(a * S_a + b * S_b, zero_sum)
        kept_a, kept_b = a * flag > 0, b * flag > 0
        best = torch.maximum(
            torch.where(kept_a, a.abs() * X_a, 0.0), torch.where(kept_b, b.abs() * X_b, 0.0)
        )
        new = elected(best, flag, u_a.dtype)
        size = new.float().abs()
        masks = [*(m & kept_a for m in masks_a), *(m & kept_b for m in masks_b)]
        out.put(start, new, masks, [torch.where(m, size, 0.0) for m in masks])
    return out.u, out.planes, out.sums(tasks)


def _decoupled(
    u: Tensor,
    plane: Tensor,
    rescaler: Tensor,
    base: Sequence[Tensor],
    via: Sequence[int],
    numels: Sequence[int],
) -> Iterator[Tensor]:
    for k, start in enumerate(offsets(numels)[0]):
        mask = unpack_bits(plane[start // 8 : (start + numels[k] + 7) // 8], numels[k])
        scaled = rescaler[k] * u[start : start + numels[k]].float()
        theta_0 = base_values(base, via, k)
        yield torch.where(mask, theta_0 + scaled, theta_0)


def decouple_(
    out: Sequence[Tensor],
    u: Tensor,
    plane: Tensor,
    rescaler: Tensor,
    base: Sequence[Tensor],
    via: Sequence[int],
) -> None:
    """Write θ_0 + λ·(M ⊙ u), or the decoupled delta if ``base`` is empty, into ``out``."""
    numels = [t.numel() for t in out]
    for target, values in zip(out, _decoupled(u, plane, rescaler, base, via, numels), strict=True):
        target.copy_(values)


def measure(model: Sequence[Tensor], base: Sequence[Tensor], via: Sequence[int]) -> Tensor:
    """Chunk sums of |model - base|, float64 [1, chunks]."""
    sums = [
        chunk_sums((t.float() - base_values(base, via, k)).abs())
        for k, t in enumerate(model)
        if t.numel()
    ]
    return torch.cat(sums)[None] if sums else torch.zeros(1, 0, dtype=torch.float64)
