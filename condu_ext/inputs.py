"""Checks of models given by name, before anything is computed.

A model is a mapping from tensor names to tensors: a state dict, or ``dict(named_parameters())``.
Floating tensors are fused; integer and bool entries must equal the base model's; names that match
a ``private`` pattern are stored whole for each task; tied tensors count once. Of a sharded tensor
(:mod:`condu_ext.sharding`) what comes out of here is the part that this process holds.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from condu_ext.layout import ModelSpec, TensorSpec, memory_order
from condu_ext.sharding import is_sharded, local_part, mesh_of, refuse_foreign_shards, shard_of
from condu_ext.ties import find_aliases, same_memory

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

Model = Mapping[str, Tensor]
FUSED_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# Subclasses that are plain memory; any other than these and DTensor may be quantised.
_PLAIN_TYPES = (Tensor, torch.nn.Parameter, torch.nn.Buffer)


def check_mapping(
    who: str,
    value: object,
    such_as: str = "dict(module.named_parameters()) or module.state_dict()",
) -> None:
    """Refuses what is given in place of names and tensors: a module, a list, a number.

    Raises:
        TypeError: naming the argument, with ``such_as`` as an example of what is meant.
    """
    if not isinstance(value, Mapping):
        raise TypeError(
            f"{who}: expected a mapping from names to tensors, got {type(value).__name__}; "
            f"use {such_as}"
        )


def check_tensor(who: str, name: str, tensor: object) -> Tensor:
    """The tensor, if it is one that can be fused, compared or stored.

    Raises:
        TypeError: not a dense, real tensor in memory, plain or a DTensor; the message names it.
    """
    where = f"{who}, tensor {name!r}"
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{where}: expected a torch.Tensor, got {type(tensor).__name__}")
    refuse_foreign_shards(where, name, tensor)
    local = local_part(tensor)
    if type(local) not in _PLAIN_TYPES:
        raise TypeError(f"{where}: tensors of type {type(local).__name__} cannot be fused")
    if local.is_quantized or local.layout != torch.strided:
        raise TypeError(f"{where}: quantised and sparse tensors cannot be fused")
    if local.device.type == "meta":
        raise TypeError(f"{where}: is on the meta device and has no values")
    return tensor


def check_mesh(who: str, model: Model, mesh: DeviceMesh | None, other: str) -> None:
    """Sharded tensors, private and integer ones too, are all on ``mesh``, where ``other`` is.

    Raises:
        ValueError: naming the first that is elsewhere.
        TypeError: a placement that cannot be fused, see :func:`condu_ext.sharding.shard_of`.
    """
    for name, tensor in model.items():
        if not is_sharded(tensor):
            continue
        where = f"{who}, tensor {name!r}"
        if (shard := shard_of(where, tensor)) and shard.mesh != mesh:
            raise ValueError(
                f"{where}: is sharded over {shard.mesh}, but {other} is "
                f"{f'over {mesh}' if mesh is not None else 'not sharded'}"
            )


def fixed_names(who: str, model: Model) -> frozenset[str]:
    """The names of integer and bool entries.

    Raises:
        TypeError: as :func:`check_mapping` and :func:`check_tensor`.
    """
    check_mapping(who, model)
    tensors = {name: check_tensor(who, name, value) for name, value in model.items()}
    return frozenset(name for name, tensor in tensors.items() if not _is_number_array(tensor))


def check_fusable(who: str, name: str, tensor: Tensor) -> None:
    """Refuses floating dtypes that the kernels do not read (float64, float8, complex)."""
    if tensor.dtype not in FUSED_DTYPES:
        raise TypeError(
            f"{who}, tensor {name!r}: {tensor.dtype} cannot be fused; "
            "use float32, bfloat16 or float16, or make the tensor private"
        )


def is_private(name: str, patterns: Iterable[str]) -> bool:
    """Whether a name matches one of the fnmatch patterns."""
    return any(fnmatchcase(name, pattern) for pattern in patterns)


def _is_number_array(tensor: Tensor) -> bool:
    return tensor.is_floating_point() or tensor.is_complex()


def describe(who: str, model: Model, private: Iterable[str]) -> ModelSpec:
    """What a state will know of a model: its fused tensors, ties, fixed and private names.

    Raises:
        TypeError: no mapping, an entry that is no tensor in memory, or a dtype or placement that
            cannot be fused.
        ValueError: no tensor to fuse, tensors that overlap, or two device meshes.
    """
    if isinstance(private, str):
        raise TypeError(f"private: expected a tuple of patterns, got the string {private!r}")
    check_mapping(who, model)
    private = tuple(private)
    fused, fixed = {}, set()
    for name, value in model.items():
        tensor = check_tensor(who, name, value)
        if is_private(name, private):
            continue
        if not _is_number_array(tensor):
            fixed.add(name)
            continue
        check_fusable(who, name, tensor)
        fused[name] = tensor
    if not fused:
        raise ValueError(f"{who}: there is no floating-point tensor to fuse")
    first = next((name for name, tensor in model.items() if is_sharded(tensor)), None)
    mesh = mesh_of(model)
    check_mesh(who, model, mesh, f"{first!r}")
    aliases = find_aliases(who, {name: local_part(tensor) for name, tensor in fused.items()})
    specs = tuple(
        _describe_tensor(who, name, tensor) for name, tensor in fused.items() if name not in aliases
    )
    private_names = frozenset(name for name in model if is_private(name, private))
    return ModelSpec(specs, aliases, frozenset(fixed), private, private_names, mesh)


def _describe_tensor(who: str, name: str, tensor: Tensor) -> TensorSpec:
    shard = shard_of(f"{who}, tensor {name!r}", tensor)
    order = tuple(range(tensor.dim())) if shard else memory_order(tensor)
    return TensorSpec(name, tuple(tensor.shape), order, shard=shard)


def check_private(spec: ModelSpec, who: str, model: Model, missing: str) -> None:
    """A task brings every private tensor that the base has, unless it may lack tensors.

    Raises:
        KeyError: naming the first that is missing.
    """
    absent = sorted(spec.private_names - set(model))
    if absent and missing == "error":
        raise KeyError(f"{who}: private tensor {absent[0]!r} is missing")


def resolve(
    spec: ModelSpec, who: str, model: Model, missing: str, *, base: str = "the base"
) -> list[Tensor | None]:
    """The local parts of ``model`` in the order of ``spec.tensors``; None where one may be missing.
    ``base`` is what errors call the model that the spec describes.

    Raises:
        KeyError: a tensor is missing (under all its names), and ``missing`` is ``"error"``.
        ValueError: an extra tensor, another shape, mesh or placement, or tied names with different
            values.
        TypeError: as :func:`check_mapping` and :func:`check_tensor`.
    """
    check_mapping(who, model)
    if missing not in ("error", "unchanged"):
        raise ValueError(f"missing must be 'error' or 'unchanged', not {missing!r}")
    known = {t.name for t in spec.tensors} | set(spec.aliases) | spec.fixed
    for name, value in model.items():
        tensor = check_tensor(who, name, value)
        if name not in known and not is_private(name, spec.private):
            raise ValueError(f"{who}: tensor {name!r} {tuple(tensor.shape)} is not in {base}")
    check_mesh(who, model, spec.mesh, base)
    result: list[Tensor | None] = []
    for entry in spec.tensors:
        given = [model[name] for name in spec.names_of(entry.name) if name in model]
        if not given:
            if missing == "error":
                raise KeyError(f"{who}: tensor {entry.name!r} is missing")
            result.append(None)
            continue
        parts = []
        for other in given:
            if tuple(other.shape) != entry.shape:
                raise ValueError(
                    f"{who}, tensor {entry.name!r}: shape {tuple(other.shape)}, "
                    f"expected {entry.shape}"
                )
            check_fusable(who, entry.name, other)
            where = f"{who}, tensor {entry.name!r}"
            if (shard := shard_of(where, other)) != entry.shard:
                raise ValueError(
                    f"{where}: placed as {shard or 'a plain tensor'}, but in {base} as "
                    f"{entry.shard or 'a plain tensor'}; redistribute one of them"
                )
            part = local_part(other)
            parts.append(part)
            first = parts[0]
            if not (part is first or same_memory(first, part) or torch.equal(first, part)):
                raise ValueError(
                    f"{who}: {' and '.join(map(repr, spec.names_of(entry.name)))} are tied in "
                    f"{base} but differ here"
                )
        result.append(parts[0].detach())
    return result


def _equal(a: Tensor, b: Tensor) -> bool:
    mine, other = local_part(a), local_part(b)
    return a.dtype == b.dtype and torch.equal(mine.to(other.device), other)


def check_fixed(spec: ModelSpec, who: str, model: Model, base: Model | None) -> None:
    """Integer and bool entries equal the base's (or are zero in a delta).

    Raises:
        ValueError: naming the entry that differs.
    """
    for name in sorted(spec.fixed):
        if name not in model:
            continue
        value = model[name]
        if base is None:
            if local_part(value).any():
                raise ValueError(f"{who}: integer tensor {name!r} of a delta is not zero")
        elif name in base and not _equal(value, base[name]):
            raise ValueError(
                f"{who}: integer tensor {name!r} ({value.dtype}) differs from the base's "
                f"({base[name].dtype}); it cannot be fused, but it can be private"
            )


def private_tensors(spec: ModelSpec, model: Model) -> dict[str, Tensor]:
    """Copies of a model's private tensors; of sharded ones, copies sharded alike."""
    return {
        name: tensor.detach().clone()
        for name, tensor in model.items()
        if is_private(name, spec.private)
    }


def check_devices(
    spec: ModelSpec,
    who: str,
    tensors: list[Tensor | None],
    devices: list[torch.device],
    other: str = "the state's part for it",
) -> None:
    """Each tensor is where the other side's is.

    Raises:
        ValueError: naming the tensor and both devices.
    """
    for entry, tensor, device in zip(spec.tensors, tensors, devices, strict=True):
        if tensor is not None and tensor.device != device:
            raise ValueError(
                f"{who}, tensor {entry.name!r}: is on {tensor.device}, "
                f"but {other} is on {device}; move one of them"
            )
