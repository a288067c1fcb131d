"""xxh3 of a tensor's or a file's bytes: recognises a base model and a damaged file."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
import xxhash
from torch import Tensor

from condu_ext.collective import Step
from condu_ext.gathering import visit_whole
from condu_ext.inputs import Model, resolve
from condu_ext.layout import ModelSpec
from condu_ext.sharding import has_copies, leads

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

_READ_SIZE = 1 << 22


def fingerprint(tensor: Tensor) -> str:
    """16 hexadecimal digits: xxh3-64 of the elements' bytes in logical (row-major) order."""
    flat = tensor.detach().contiguous().view(-1).view(torch.uint8).cpu()
    return xxhash.xxh3_64_hexdigest(flat.numpy().data)


def fingerprints(mesh: DeviceMesh | None, tensors: Mapping[str, Tensor]) -> dict[str, str]:
    """:func:`fingerprint` of every tensor by name. Collective over ``mesh``: of a sharded tensor it
    is that of the whole, which every process then holds for a moment, one after another.

    Raises:
        ValueError: the processes have other names, shapes or dtypes, or copies that differ.
    """
    with Step(mesh) as checks:
        for name, tensor in tensors.items():
            checks.claims[f"tensor {name!r} (shape, dtype)"] = tuple(tensor.shape), tensor.dtype
    found = {}

    def visit(name: str, tensor: Tensor) -> None:
        if leads(mesh) or has_copies(tensors[name]):
            found[name] = fingerprint(tensor)

    visit_whole(mesh, tensors.items(), visit)
    with Step(mesh) as step:
        step.mine = found
        for name in filter(lambda name: has_copies(tensors[name]), tensors):
            step.claims[f"tensor {name!r} (fingerprint)"] = found[name]
    digits: dict[str, str] = step.all[0]
    return digits


def model_fingerprints(spec: ModelSpec, pretrained: Model) -> dict[str, str]:
    """:func:`fingerprints` of the fused tensors of a base model.

    Raises:
        KeyError, ValueError, TypeError: names, shapes or placements are not those of ``spec``.
    """
    with Step(spec.mesh):
        parts = [t for t in resolve(spec, "pretrained", pretrained, "error") if t is not None]
    pairs = zip(spec.tensors, parts, strict=True)
    return fingerprints(spec.mesh, {entry.name: entry.wrap(part) for entry, part in pairs})


def file_fingerprint(path: str | os.PathLike[str]) -> str:
    """16 hexadecimal digits: xxh3-64 of a file's bytes, read piece by piece."""
    digest = xxhash.xxh3_64()
    with open(path, "rb") as file:
        while piece := file.read(_READ_SIZE):
            digest.update(piece)
    return digest.hexdigest()
