"""Fingerprints of tensors in files: what tells one base model from another."""

from __future__ import annotations

from functools import partial

import xxhash

from condu.checkpoint.sources import Source
from condu.checkpoint.tensor_files import as_bytes, pieces


def source_fingerprint(source: Source, name: str) -> str:
    """xxh3-64 of a tensor's bytes in row-major order, as :func:`condu_ext.fingerprint.fingerprint`
    of the whole tensor gives it.

    Raises:
        OSError: the file cannot be read.
    """
    tensor, digest = source.tensors[name], xxhash.xxh3_64()
    for _, piece in pieces(partial(source.read, name), tensor):
        digest.update(as_bytes(piece))
    return digest.hexdigest()
