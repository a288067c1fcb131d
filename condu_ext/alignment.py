"""Aligned merging (PAM): keep a fine-tune from working against the model that it will join.

One global adapter evolves. For each task it is cloned; the clone is fine-tuned, and every few steps
:func:`align_` takes back the weights that moved against the global adapter's strongest ones; at
the end :func:`average_` joins the two. With g the global adapter's weights (``reference``) and w
the clone's (``current``):

    τ = the ⌈top·n⌉-th largest |g|               :func:`magnitude_threshold`, once a task
    w ← 0 or g   where |g| ≥ τ and g·w < 0       :func:`align_`, every few steps
    g ← a·g + (1 − a)·w                          :func:`average_`, after the task

Adapters are mappings from names to tensors (``dict(module.named_parameters())``, or the tensors of
a LoRA) of float32, bfloat16 or float16, mixed as they are; the dtypes of g and w may differ.
Integer and bool entries are left alone, on whichever side they are; tied tensors count once; empty
ones are allowed. Tensors that are not contiguous are worked on in memory order where both sides
agree, else through a copy of that tensor. Each tensor is processed where it lives. Every back end
gives the same bits.

Common arguments:
    backend: as in :mod:`condu_ext.fusion`: None, ``"cpu"``, ``"cuda"`` or ``"reference"``.

Common errors, which leave every argument as it was: ``KeyError`` for a missing tensor;
``TypeError`` for an argument of another type, and for a tensor that the kernels do not read
(float64, quantised, sharded); ``ValueError`` for an extra name, another shape or device, memory
shared with what is written, an expanded or negated target, an unknown option; ``RuntimeError`` for
writing to a leaf that requires grad outside ``torch.no_grad()``. All name the argument and the
tensor.

NaN and infinity: refused by :func:`magnitude_threshold` (its counts show them) and, unless
``check=False``, by :func:`average_`, each with a ``ValueError``; both synchronise with the device.
:func:`align_` does not look for them, and does not synchronise: a NaN has no sign, so it neither
conflicts nor is replaced.

Source: PAM, arXiv 2506.03189. It leaves open: the quantile per tensor or over all (``scope``), the
weight a, and how often to align.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from fractions import Fraction
from numbers import Real
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from condu_ext import _alignment_ops, _native, alignment_reference
from condu_ext import reference as fusion_reference
from condu_ext._dispatch import kernels_for
from condu_ext._modes import without_autograd
from condu_ext.inputs import Model, check_devices, check_mapping, describe, fixed_names, resolve
from condu_ext.layout import ModelSpec, group_by_device
from condu_ext.sharding import refuse_sharded
from condu_ext.targets import check_targets, write_through

Scope = Literal["tensor", "global"]
Replacement = Literal["zero", "global"]


def _kernels(backend: str | None, device: torch.device) -> Any:
    plain = kernels_for(backend, device) is fusion_reference
    return alignment_reference if plain else _alignment_ops


def _check_option(name: str, value: str, kinds: tuple[str, ...]) -> None:
    if value not in kinds:
        raise ValueError(f"{name} must be {' or '.join(map(repr, kinds))}, not {value!r}")


def _check_number(name: str, value: object) -> None:
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f"{name}: expected a number, got {type(value).__name__}")


def _all_present(tensors: Iterable[Tensor | None]) -> list[Tensor]:
    """After ``resolve(…, missing="error")``."""
    return [t for t in tensors if t is not None]


def _refuse_non_finite(who: str, names: Sequence[str], tensors: Sequence[Tensor]) -> None:
    for name, tensor in zip(names, tensors, strict=True):
        if not tensor.isfinite().all():
            raise ValueError(f"{who}, tensor {name!r}: has NaN or infinite values")


@without_autograd
def magnitude_threshold(
    reference: Model, top: float = 0.5, scope: Scope = "tensor", *, backend: str | None = None
) -> dict[str, Tensor]:
    """The magnitude that the strongest weights reach, selected exactly.

    τ is the ⌈top·n⌉-th largest |g|, a value that occurs (no interpolation, no sampling): at least
    ⌈top·n⌉ elements have |g| ≥ τ, and fewer than that have |g| > τ. ``top`` counts as the decimal
    number that it prints as, so 10 % of 30 elements are 3, also as ``numpy.float32(0.1)``.

    Args:
        reference: the global adapter.
        top: the share of the weights that count as strong, in (0, 1].
        scope: ``"tensor"``: n elements of each tensor; ``"global"``: of all tensors together, which
            for this are copied to the first one's device if there are several devices.

    Returns:
        name → 0-dim float32 tensor on that tensor's device, in the order of ``reference``; tied
        names share one. With ``"global"`` the values are all the same. Where there is no element,
        τ = +Inf.

    Raises:
        ValueError: NaN or infinite values, naming a tensor.
    """
    _check_number("top", top)
    if not 0 < top <= 1:
        raise ValueError(f"top must be in (0, 1], not {top!r}")
    _check_option("scope", scope, get_args(Scope))
    refuse_sharded("reference", reference)
    spec = describe("reference", reference, ())
    tensors = _all_present(resolve(spec, "reference", reference, "error"))
    names = [entry.name for entry in spec.tensors]
    flat = [entry.flatten(t) for entry, t in zip(spec.tensors, tensors, strict=True)]

    def rank(numel: int) -> int:
        return math.ceil(Fraction(str(top)) * numel)

    if scope == "global":
        device = flat[0].device
        together = _kernels(backend, device).magnitude_threshold(
            [t.to(device) for t in flat], [rank(sum(t.numel() for t in flat))]
        )
        selected = [together]
        found = {name: together[0].to(t.device) for name, t in zip(names, flat, strict=True)}
    else:
        selected, found = [], {}
        for device, index in group_by_device([t.device for t in flat]).items():
            own = _kernels(backend, device).magnitude_threshold(
                [flat[k] for k in index], [rank(flat[k].numel()) for k in index]
            )
            selected.append(own)
            found |= {names[k]: value for k, value in zip(index, own, strict=True)}
    if any(bool(values.isnan().any()) for values in selected):
        _refuse_non_finite("reference", names, flat)
    # A tensor each, not views of one: what saves tensors may refuse shared memory.
    own = {name: value.clone() for name, value in found.items()}
    return {n: own[spec.aliases.get(n, n)] for n in reference if n not in spec.fixed}


class _Pair:
    """An adapter that is written and one that is read, checked against each other."""

    def __init__(self, written: tuple[str, Model], read: tuple[str, Model]) -> None:
        (who, out), (other, model) = written, read
        refuse_sharded(who, out)
        refuse_sharded(other, model)
        self.spec: ModelSpec = describe(who, out, ())
        self.targets = _all_present(resolve(self.spec, who, out, "error"))
        self.devices = [t.device for t in self.targets]
        integers = self.spec.fixed | fixed_names(other, model)  # of either side: left alone
        found = resolve(replace(self.spec, fixed=integers), other, model, "error", base=who)
        check_devices(self.spec, other, found, self.devices, who)
        check_targets(self.spec, who, out, self.targets, {other: found})
        self.sources = _all_present(found)
        self._written = [t for name, t in out.items() if name not in self.spec.fixed]

    def parts(self, backend: str | None) -> list[tuple[torch.device, Any, list[int]]]:
        """Kernels and positions of the tensors of each device, all known before one is written."""
        groups = group_by_device(self.devices)
        return [(device, _kernels(backend, device), index) for device, index in groups.items()]

    def read(self, index: Sequence[int]) -> list[Tensor]:
        return [self.spec.tensors[k].flatten(self.sources[k]) for k in index]

    def write(self, index: Sequence[int]) -> Any:
        return write_through(
            [self.spec.tensors[k] for k in index], [self.targets[k] for k in index]
        )

    def mark_written(self) -> None:
        """Tell autograd."""
        torch.autograd.graph.increment_version([t for t in self._written if not t.is_inference()])


def align_(
    current: Model,
    reference: Model,
    threshold: Mapping[str, Tensor],
    to: Replacement = "zero",
    *,
    backend: str | None = None,
) -> Tensor:
    """Take back the weights that conflict with strong weights of the global adapter, in place.

    A weight conflicts where |g| ≥ τ and g·w < 0, judged by the signs (the product could
    underflow); ±0 and NaN have no sign.

    Args:
        current: the clone being fine-tuned, written in one pass. Its optimiser state is not
            touched.
        reference: the global adapter g.
        threshold: τ by name, from :func:`magnitude_threshold` (0-dim float32 on the tensor's
            device). Of tied tensors, one name is enough; all must agree, which waits for the device
            where they are not one tensor.
        to: what conflicting weights become, ``"zero"`` (+0) or ``"global"`` (g, rounded to the
            weight's dtype).

    Returns:
        The fraction of conflicting weights (of all weights of ``current``; 0 if there is none):
        float64 [] on the first tensor's device, so that nothing has to wait for it.
    """
    _check_option("to", to, get_args(Replacement))
    pair = _Pair(("current", current), ("reference", reference))
    limits = _thresholds(pair, current, threshold)
    conflicts = []
    with torch.no_grad():
        for _, kernels, index in pair.parts(backend):
            with pair.write(index) as flat:
                own = torch.stack([limits[k] for k in index])
                conflicts.append(kernels.align_(flat, pair.read(index), own, to == "global"))
        total = sum(t.numel() for t in pair.targets)
        counted = sum((c.to(pair.devices[0]) for c in conflicts[1:]), conflicts[0])
    pair.mark_written()
    # A tensor as divisor: by a number, a GPU multiplies with the reciprocal, which may differ.
    return counted.double() / torch.full_like(counted, max(total, 1), dtype=torch.float64)


def _thresholds(pair: _Pair, current: Model, threshold: Mapping[str, Tensor]) -> list[Tensor]:
    """τ of each fused tensor, in the order of the spec."""
    check_mapping("threshold", threshold, such_as="what magnitude_threshold returns")
    for name in threshold:
        if name not in current:
            raise ValueError(f"threshold: {name!r} is not in current")
    limits = []
    for entry, device in zip(pair.spec.tensors, pair.devices, strict=True):
        given = {n: threshold[n] for n in pair.spec.names_of(entry.name) if n in threshold}
        if not given:
            raise KeyError(f"threshold: tensor {entry.name!r} is missing")
        for name, limit in given.items():
            _check_threshold(name, limit, device)
        (first, limit), *others = given.items()
        for name, other in others:
            # Tied names share one tensor, as magnitude_threshold returns them: no need to wait.
            if other is not limit and not torch.allclose(other, limit, 0, 0, equal_nan=True):
                raise ValueError(
                    f"threshold: {first!r} and {name!r} are tied in current, but have "
                    f"{limit.item()} and {other.item()}"
                )
        limits.append(limit.detach())
    return limits


def _check_threshold(name: str, limit: object, device: torch.device) -> None:
    where = f"threshold, tensor {name!r}"
    if not isinstance(limit, Tensor) or limit.dtype != torch.float32 or limit.dim():
        raise TypeError(f"{where}: expected a 0-dim float32 tensor, got {limit!r}")
    if limit.device != device:
        raise ValueError(
            f"{where}: is on {limit.device}, but current is on {device}; move one of them"
        )


def average_(
    reference: Model,
    current: Model,
    weight: float = 0.5,
    *,
    check: bool = True,
    backend: str | None = None,
) -> None:
    """Join a fine-tuned clone with the global adapter, in place: g ← a·g + (1 − a)·w.

    With a and 1 − a rounded to float32 once (1 − a is formed in float64), both products and the sum
    are rounded to float32, and the sum then to g's dtype; no fused multiply-add.

    Args:
        reference: the global adapter g, written.
        current: the fine-tuned clone w.
        weight: a, the share of g that stays, in [0, 1]; with 1 − 1/t when the t-th task joins, g is
            the mean of all.
        check: read both adapters once more first, so that NaN or infinite values leave
            ``reference`` as it was. Without it they go into g by the rules of arithmetic.

    Raises:
        ValueError: NaN or infinite values (with ``check``).
    """
    _check_number("weight", weight)
    if not 0 <= weight <= 1:
        raise ValueError(f"weight must be in [0, 1], not {weight!r}")
    pair = _Pair(("reference", reference), ("current", current))
    parts = pair.parts(backend)
    with torch.no_grad():
        if check:
            for device, _, index in parts:
                measure = kernels_for(backend, device).measure
                entries = [pair.spec.tensors[k] for k in index]
                for who, tensors in (("reference", pair.targets), ("current", pair.sources)):
                    flat = [e.flatten(tensors[k]) for e, k in zip(entries, index, strict=True)]
                    sums = _native.add_chunks([e.numel for e in entries], measure(flat, [], []))
                    if not sums.isfinite().all():
                        _refuse_non_finite(who, [e.name for e in entries], flat)
        for _, kernels, index in parts:
            with pair.write(index) as flat:
                kernels.average_(flat, pair.read(index), float(weight))
    pair.mark_written()
