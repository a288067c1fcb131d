"""xxh3 of a tensor's or a file's bytes: recognises a base model and a damaged file."""

from __future__ import annotations

import os

import torch
import xxhash
from torch import Tensor

_READ_SIZE = 1 << 22


def fingerprint(tensor: Tensor) -> str:
    """16 hexadecimal digits: xxh3-64 of the elements' bytes in logical (row-major) order."""
    flat = tensor.detach().contiguous().view(-1).view(torch.uint8).cpu()
    return xxhash.xxh3_64_hexdigest(flat.numpy().data)


def file_fingerprint(path: str | os.PathLike[str]) -> str:
    """16 hexadecimal digits: xxh3-64 of a file's bytes, read piece by piece."""
    digest = xxhash.xxh3_64()
    with open(path, "rb") as file:
        while piece := file.read(_READ_SIZE):
            digest.update(piece)
    return digest.hexdigest()
