"""Is what was timed right? Bit for bit against the reference, and against every baseline that runs.

The reference is slow and takes much memory, so it checks the first, middle and last elements of
every tensor, in all :data:`SAMPLE` of them. Unified delta, masks and experts are computed element
by element from the incoming state, which is what makes parts comparable. Sums are
the matter of :mod:`condu.bench.sums`. Baselines are compared on every element.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import condu_ext as cx
from condu.bench.baselines.base import Triggered, rescaler_of
from condu.bench.shapes import Shapes, parameters
from condu_ext import reference
from condu_ext.layout import ALIGN
from condu_ext.reference import pack_bits

SAMPLE = 1 << 22
DIFFERENT = 1e-5
"""Share of elements in which a baseline that adds in another order may elect another sign."""


ROUNDING = 1e-6
"""Difference of an expert relative to |θ_0| + |δ| that one rounding less explains."""


class WrongResult(RuntimeError):
    """A kernel's result is not the reference's: its time would mean nothing."""


class WrongBaseline(RuntimeError):
    """A baseline's result is not that of a kernel which equals the reference.

    Attributes:
        different: number of elements that differ; None where a rescaler does.
    """

    def __init__(self, message: str, different: int | None = None) -> None:
        super().__init__(message)
        self.different = different


Parts = Mapping[str, Sequence[slice]]
"""Elements of each tensor by name; every slice but the last ends at a multiple of ALIGN."""


def sample(shapes: Shapes) -> dict[str, list[slice]]:
    """The first, some middle and the last elements of every tensor, each from a multiple of
    :data:`ALIGN` on; the whole of a small tensor, and of every tensor of a small model."""
    each = max(ALIGN, SAMPLE // len(shapes) // 3 // ALIGN * ALIGN)
    if parameters(shapes) <= SAMPLE:
        each = SAMPLE
    return {name: _slices(math.prod(shape), each) for name, shape in shapes.items()}


def _slices(numel: int, each: int) -> list[slice]:
    if numel <= 3 * each + 2 * ALIGN:
        return [slice(0, numel)]
    middle, last = ((numel - each) // k // ALIGN * ALIGN for k in (2, 1))
    return [slice(0, each), slice(middle, middle + each), slice(last, numel)]


def cut(flat: Tensor, parts: Sequence[slice]) -> Tensor:
    """The elements in ``parts`` of a flat tensor, one after another."""
    return torch.cat([flat[part] for part in parts])


def count(parts: Parts) -> int:
    """Number of elements."""
    return sum(part.stop - part.start for slices in parts.values() for part in slices)


@dataclass
class Excerpt:
    """Some elements of a state as the operators take them: an arena of one tensor."""

    u: Tensor
    planes: list[Tensor]
    rescaler: Tensor  # [tasks, 1]
    numel: int

    def require_equal(self, u: Tensor, planes: Sequence[Tensor], what: str) -> None:
        """Raises WrongResult unless another arena holds the same bits."""
        require_same_bits(self.u[: self.numel], u[: self.numel], f"{what}: unified delta")
        packed = (self.numel + 7) // 8
        for t, (ours, theirs) in enumerate(zip(self.planes, planes, strict=True)):
            require_same_bits(ours[:packed], theirs[:packed], f"{what}: mask {t}")


def excerpts(state: cx.UnifiedDelta, parts: Parts) -> dict[str, Excerpt]:
    """Copies of some elements of every tensor of a state."""
    rescalers = [rescaler_of(state, task) for task in state.tasks]
    found = {}
    for name, u in state.delta.items():
        flat = cut(u.view(-1), parts[name])
        table = torch.tensor(rescalers, device=u.device).view(-1, 1)
        found[name] = Excerpt(_padded(flat, len(flat)), [], table, len(flat))
    for task in state.tasks:
        for name, packed in state.packed_mask(task).items():
            bits = cut(packed, [slice(p.start // 8, (p.stop + 7) // 8) for p in parts[name]])
            found[name].planes.append(_padded(bits, found[name].numel, 8))
    return found


def _padded(values: Tensor, numel: int, per_value: int = 1) -> Tensor:
    size = (numel + ALIGN - 1) // ALIGN * ALIGN // per_value
    return torch.nn.functional.pad(values, (0, size - len(values)))


def require_same_bits(ours: Tensor, theirs: Tensor, what: str) -> None:
    """Raises WrongResult naming ``what`` unless every bit is the same."""
    bits = [tensor.view(torch.uint8) for tensor in (ours, theirs)]
    if ours.dtype != theirs.dtype or not torch.equal(*bits):
        different = int((ours != theirs).sum())
        raise WrongResult(f"{what} differs from the reference in {different} of {len(ours)} values")


def different_elements(
    ours: Any, theirs: Any, what: str, base: Mapping[str, Tensor] | None = None
) -> int:
    """Number of elements in which unified delta, a mask or an expert differ from a baseline's.

    Args:
        base: θ_0, if experts may differ by rounding: a compiler contracts θ_0 + λ·u to one
            multiply-add, which rounds once where the rule rounds twice.

    Raises:
        WrongBaseline: more than rounding explains, or rescalers that are not equal to 1e-5.
    """
    if isinstance(theirs, Triggered):
        total, different = _different_state(ours, theirs, what)
        beyond = different
    else:
        total = sum(t.numel() for t in ours.values())
        different = sum(int((ours[name] != theirs[name]).sum()) for name in ours)
        beyond = different
        if base is not None:
            beyond = sum(_beyond_rounding(ours[n], theirs[n], base[n]) for n in ours)
    if beyond > max(4, DIFFERENT * total):
        raise WrongBaseline(f"{what}: {beyond} of {total} elements are not the kernel's", beyond)
    return different


def _beyond_rounding(ours: Tensor, theirs: Tensor, base: Tensor) -> int:
    """Elements of an expert that differ by more than :data:`ROUNDING`, or in 16 bits by more than
    the neighbouring number, which a last bit in float32 may decide."""
    limits = torch.finfo(ours.dtype)
    theta_0, expert = base.float(), ours.float()
    size = theta_0.abs() + (expert - theta_0).abs()
    allowed = max(ROUNDING, limits.eps) * size + limits.smallest_normal * limits.eps
    near = (expert - theirs.float()).abs() <= allowed  # False for NaN
    return int((~near).sum())


def _different_state(ours: cx.UnifiedDelta, theirs: Triggered, what: str) -> tuple[int, int]:
    delta = ours.delta
    differs = {name: u != theirs.delta[name] for name, u in delta.items()}
    for t, task in enumerate(ours.tasks):
        for name, packed in ours.packed_mask(task).items():
            mask = theirs.masks[t][name].reshape(-1)
            if not torch.equal(packed, pack_bits(mask)):
                own = reference.unpack_bits(packed, mask.numel())
                differs[name] |= (own != mask).view(differs[name].shape)
        own_rescaler = rescaler_of(ours, task)
        if not math.isclose(own_rescaler, theirs.rescalers[t], rel_tol=1e-5):
            raise WrongBaseline(
                f"{what}: rescaler of {task} is {own_rescaler}, the baseline's "
                f"{theirs.rescalers[t]}"
            )
    total = sum(u.numel() for u in delta.values())
    return total, sum(int(different.sum()) for different in differs.values())
