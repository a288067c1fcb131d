"""Fine-tuned checkpoints against their base: which tensors are fused, and from which values.

The rules are those of :mod:`condu_ext.inputs`, asked of names, shapes and dtypes alone, before any
data is read. They leave out what files cannot have: devices, strides, tied memory.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from condu.checkpoint.options import Options
from condu.checkpoint.sources import Source, Stored
from condu.checkpoint.tensor_files import pieces
from condu_ext.inputs import check_fusable, is_private
from condu_ext.layout import ModelSpec, TensorSpec
from condu_ext.rounding import with_rounding


@dataclass(frozen=True)
class Matched:
    """A fine-tuned checkpoint that fits.

    Attributes:
        source: where its values are.
        names: by position in the spec, the name under which it has the tensor, or None where it
            counts as not fine-tuned.
        private: its private tensors.
    """

    source: Source
    names: Sequence[str | None]
    private: Mapping[str, Stored]


def describe(base: Source, private: Sequence[str]) -> ModelSpec:
    """The spec of a state over a base checkpoint.

    Raises:
        TypeError: a dtype that cannot be fused (float64, float8), naming the tensor.
        ValueError: there is no tensor to fuse, or the base is an adapter.
    """
    if base.is_delta:
        raise ValueError(f"{base.where} is an adapter: the base is the model that it adapts")
    entries, fixed = [], set()
    for name, tensor in base.tensors.items():
        if is_private(name, private):
            continue
        if not _is_float(tensor):
            fixed.add(name)
            continue
        check_fusable(base.where, name, _shadow(tensor))
        entries.append(TensorSpec(name, tensor.shape, tuple(range(len(tensor.shape)))))
    if not entries:
        raise ValueError(f"{base.where}: there is no floating-point tensor to fuse")
    private_names = frozenset(name for name in base.tensors if is_private(name, private))
    return ModelSpec(tuple(entries), {}, frozenset(fixed), tuple(private), private_names)


def find_base(spec: ModelSpec, base: Source) -> list[str]:
    """Under which name the base has each fused tensor of a state's spec.

    Raises:
        KeyError, ValueError, TypeError: it lacks one, or has it in another shape or dtype.
    """
    if base.is_delta:
        raise ValueError(f"{base.where} is an adapter: the base is the model that it adapts")
    names = []
    for entry in spec.tensors:
        name = _name_in(base, spec, entry)
        if name is None:
            raise KeyError(f"{base.where}: tensor {entry.name!r} is missing")
        if base.tensors[name].shape != entry.shape:
            raise ValueError(
                f"{base.where}, tensor {name!r}: shape {base.tensors[name].shape}, the state's is "
                f"{entry.shape}"
            )
        check_fusable(base.where, name, _shadow(base.tensors[name]))
        names.append(name)
    return names


def match(
    spec: ModelSpec,
    task: str,
    source: Source,
    base: Source,
    base_names: Sequence[str],
    options: Options,
    *,
    settled: bool,
) -> tuple[ModelSpec, Matched]:
    """A fine-tuned checkpoint against a spec, which comes back with the roundings of θ_0.

    Args:
        settled: whether earlier tasks fixed from which θ_0 they start.

    Raises:
        KeyError: a tensor is missing. ValueError: a tensor that the base lacks, another shape, a
        dtype narrower than the base's, other integer values, an adapter of a private tensor.
        TypeError: a dtype that cannot be fused. All name the task and the tensor. With
        ``options.on_mismatch="skip"`` missing, extra and differently shaped tensors are reported
        instead.
    """
    who = f"task {task!r}"
    names: list[str | None] = []
    for entry in spec.tensors:
        name = _name_in(source, spec, entry)
        if name is None:
            if not source.is_delta:
                _mismatch(options, KeyError, f"{who}: tensor {entry.name!r} is missing")
        elif (shape := source.tensors[name].shape) != entry.shape:
            _mismatch(
                options,
                ValueError,
                f"{who}, tensor {name!r}: shape {shape}, the base's is {entry.shape}",
            )
            name = None
        else:
            check_fusable(who, name, _shadow(source.tensors[name]))
        names.append(name)
    private = {n: t for n, t in source.tensors.items() if is_private(n, spec.private)}
    if source.is_delta and private:
        raise ValueError(
            f"{who}: the adapter changes {next(iter(private))!r}, which is private: such tensors "
            "are stored whole, and an adapter only has the difference from the base"
        )
    _refuse_extra(spec, who, source, options)
    if not any(names):
        raise ValueError(f"{who}: {source.where} has none of the base's tensors")
    _check_fixed(spec, who, source, base)
    for name in sorted(spec.private_names - private.keys()):
        if not source.is_delta:
            _mismatch(options, KeyError, f"{who}: private tensor {name!r} is missing")
    if source.is_delta:
        return spec, Matched(source, names, private)
    shadows = [_shadow(source.tensors[n]) if n is not None else None for n in names]
    starts: list[Tensor | None] = [_shadow(base.tensors[n]) for n in base_names]
    rounded = with_rounding(
        spec, who, shadows, starts, match_dtype=options.match_dtype, settled=settled
    )
    return rounded, Matched(source, names, private)


def logical(spec: ModelSpec) -> ModelSpec:
    """The spec with all tensors in the order in which files have them."""
    entries = (replace(e, order=tuple(range(len(e.shape)))) for e in spec.tensors)
    return replace(spec, tensors=tuple(entries))


def _is_float(tensor: Stored) -> bool:
    return tensor.dtype.is_floating_point or tensor.dtype.is_complex


def _shadow(tensor: Stored) -> Tensor:
    """A tensor without values, for checks of shape and dtype."""
    return torch.empty(tensor.shape, dtype=tensor.dtype, device="meta")


def _name_in(source: Source, spec: ModelSpec, entry: TensorSpec) -> str | None:
    return next((name for name in spec.names_of(entry.name) if name in source.tensors), None)


def _mismatch(options: Options, kind: type[Exception], message: str) -> None:
    if options.on_mismatch == "error":
        raise kind(f"{message}; on_mismatch='skip' takes such tensors as not fine-tuned")
    options.report(f"{message}: taken as not fine-tuned")


def _refuse_extra(spec: ModelSpec, who: str, source: Source, options: Options) -> None:
    known = {*spec.names, *spec.fixed}
    for name, tensor in source.tensors.items():
        if name not in known and not is_private(name, spec.private):
            if source.is_delta:
                raise ValueError(f"{who}: the adapter changes {name!r}, which the base lacks")
            _mismatch(
                options, ValueError, f"{who}: tensor {name!r} {tensor.shape} is not in the base"
            )


def _check_fixed(spec: ModelSpec, who: str, source: Source, base: Source) -> None:
    """Integer and bool entries equal the base's."""
    for name in sorted(spec.fixed & source.tensors.keys() & base.tensors.keys()):
        mine, other = source.tensors[name], base.tensors[name]
        if (mine.shape, mine.dtype) == (other.shape, other.dtype) and _equal(source, base, name):
            continue
        raise ValueError(
            f"{who}: integer tensor {name!r} ({mine.dtype} {mine.shape}) differs from the base's "
            f"({other.dtype} {other.shape}); it cannot be fused, but it can be private"
        )


def _equal(a: Source, b: Source, name: str) -> bool:
    tensor = a.tensors[name]
    both = (pieces(partial(source.read, name), tensor) for source in (a, b))
    return all(torch.equal(mine, other) for (_, mine), (_, other) in zip(*both, strict=True))
