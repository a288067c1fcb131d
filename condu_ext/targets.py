"""Tensors that are written in place: what is refused, and how they are reached."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from condu_ext.inputs import Model, check_devices
from condu_ext.layout import ModelSpec, TensorSpec
from condu_ext.sharding import local_part, shard_of
from condu_ext.ties import find_shared


def check_targets(
    spec: ModelSpec,
    who: str,
    out: Model,
    targets: Sequence[Tensor],
    kept: Mapping[str, Sequence[Tensor | None]],
    others: Mapping[str, Tensor] | None = None,
) -> None:
    """Refuse targets that cannot be written without harm; nothing has been written yet.

    Args:
        who: what errors call ``out``.
        targets: the local parts of the tensors of ``out``, in the order of the spec.
        kept: what must survive, by what errors call it.
        others: further local parts of tensors of ``out`` that are written.

    Raises:
        RuntimeError: a leaf that requires grad, outside ``torch.no_grad()``.
        ValueError: an expanded tensor, a negated view, one that shares memory with another or with
            what must survive, or one that is tied in the spec and not in ``out``.
    """
    if torch.is_grad_enabled():
        for name, tensor in out.items():
            root = tensor._base if tensor._base is not None else tensor  # of a view
            if root.requires_grad and root.is_leaf:
                raise RuntimeError(
                    f"{who}, tensor {name!r}: a leaf that requires grad can only be written inside "
                    "torch.no_grad()"
                )
    written = {entry.name: t for entry, t in zip(spec.tensors, targets, strict=True)}
    for name, tensor in written.items():
        if any(s == 0 and n > 1 for s, n in zip(tensor.stride(), tensor.shape, strict=True)):
            raise ValueError(f"{who}, tensor {name!r}: is expanded, its elements share memory")
        if tensor.is_neg():  # its memory holds −x, so kernels would write the wrong sign
            raise ValueError(f"{who}, tensor {name!r}: is a negated view; use a copy")
    for entry in spec.tensors:
        for name in spec.names_of(entry.name):
            if name in out and local_part(out[name]).data_ptr() != written[entry.name].data_ptr():
                raise ValueError(f"{who}: {entry.name!r} is tied in the state, but not here")
    named = [(f"{who}, tensor {name!r}", tensor) for name, tensor in written.items()]
    if shared := find_shared(
        [*named, *((f"{who}, tensor {n!r}", t) for n, t in (others or {}).items())]
    ):
        raise ValueError(f"{shared[0]}: shares memory with {shared[1]}, but they are not tied")
    for what, tensors in kept.items():
        occupied = [(what, tensor) for tensor in tensors if tensor is not None and tensor.numel()]
        if shared := find_shared([*named, *occupied]):
            target = next(name for name in shared if name != what)
            raise ValueError(f"{target}: shares memory with {what}, which must survive; use a copy")


def check_writable(
    spec: ModelSpec,
    out: Model,
    targets: Sequence[Tensor],
    base: Sequence[Tensor | None],
    private: Mapping[str, Tensor],
    devices: Sequence[torch.device],
    arenas: Sequence[Tensor],
) -> None:
    """:func:`check_targets` of an expert: its fused and its private tensors.

    Raises:
        KeyError: a private tensor of the task has no place in ``out``.
        ValueError: a private tensor's place has another shape, dtype or placement; a target is
            elsewhere.
    """
    check_targets(
        spec,
        "out",
        out,
        targets,
        {"pretrained": base, "the state": arenas},
        {name: local_part(out[name]) for name in private if name in out},
    )
    check_devices(spec, "out", list(targets), list(devices))
    for name, tensor in private.items():
        if name not in out:
            raise KeyError(f"out: private tensor {name!r} is missing")
        if out[name].shape != tensor.shape or out[name].dtype != tensor.dtype:
            raise ValueError(
                f"out, private tensor {name!r}: {out[name].dtype} {tuple(out[name].shape)}, "
                f"expected {tensor.dtype} {tuple(tensor.shape)}"
            )
        place = shard_of(f"out, private tensor {name!r}", out[name])
        if place != (own := shard_of(f"private tensor {name!r}", tensor)):
            raise ValueError(
                f"out, private tensor {name!r}: placed as {place}, but the task's as {own}"
            )


@contextmanager
def write_through(
    entries: Sequence[TensorSpec], targets: Sequence[Tensor]
) -> Iterator[list[Tensor]]:
    """Flat tensors to write: views where possible, else copies that are put back at the end."""
    flat = [entry.flatten(target) for entry, target in zip(entries, targets, strict=True)]
    yield flat
    for entry, target, values in zip(entries, targets, flat, strict=True):
        if not entry.is_view(target):
            target.copy_(entry.unflatten(values))
