"""xxh3 of a tensor's or a file's bytes: recognises a base model and a damaged file."""

from __future__ import annotations

import os

import torch
import xxhash
from torch import Tensor

from condu_ext.collective import Step
from condu_ext.inputs import Model, resolve
from condu_ext.layout import ModelSpec
from condu_ext.sharding import leads, whole

_READ_SIZE = 1 << 22


def fingerprint(tensor: Tensor) -> str:
    """16 hexadecimal digits: xxh3-64 of the elements' bytes in logical (row-major) order."""
    flat = tensor.detach().contiguous().view(-1).view(torch.uint8).cpu()
    return xxhash.xxh3_64_hexdigest(flat.numpy().data)


def model_fingerprints(spec: ModelSpec, pretrained: Model) -> dict[str, str]:
    """:func:`fingerprint` of every fused tensor of a base model, by name. Of sharded ones it is
    that of the whole tensor, which every process then holds for a moment, one after another.

    Raises:
        KeyError, ValueError, TypeError: names, shapes or placements are not those of ``spec``.
    """
    with Step(spec.mesh) as checks:
        tensors = [t for t in resolve(spec, "pretrained", pretrained, "error") if t is not None]
        checks.claims["the dtypes of pretrained"] = [tensor.dtype for tensor in tensors]
    found = {}
    with Step(spec.mesh) as step:
        for entry, local in zip(spec.tensors, tensors, strict=True):
            tensor = whole(entry.wrap(local))
            if leads(spec.mesh):
                found[entry.name] = fingerprint(tensor)
        step.mine = found
    digits: dict[str, str] = step.all[0]
    return digits


def file_fingerprint(path: str | os.PathLike[str]) -> str:
    """16 hexadecimal digits: xxh3-64 of a file's bytes, read piece by piece."""
    digest = xxhash.xxh3_64()
    with open(path, "rb") as file:
        while piece := file.read(_READ_SIZE):
            digest.update(piece)
    return digest.hexdigest()
