"""Fingerprints of tensors in files: what tells one base model from another."""

from __future__ import annotations

import torch
import xxhash

from condu.checkpoint.sources import Source
from condu.checkpoint.tensor_files import as_bytes

_PIECE = 1 << 20  # elements read at a time


def source_fingerprint(source: Source, name: str) -> str:
    """xxh3-64 of a tensor's bytes in row-major order, as :func:`condu_ext.fingerprint.fingerprint`
    of the whole tensor gives it.

    Raises:
        OSError: the file cannot be read.
    """
    tensor, digest = source.tensors[name], xxhash.xxh3_64()
    piece = torch.empty(min(_PIECE, tensor.numel), dtype=tensor.dtype)
    for start in range(0, tensor.numel, _PIECE):
        stop = min(start + _PIECE, tensor.numel)
        source.read(name, start, stop, piece)
        digest.update(as_bytes(piece[: stop - start]))
    return digest.hexdigest()
