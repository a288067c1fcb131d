"""Models of the Hugging Face hub, downloaded into its cache."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from condu.checkpoint.safetensors_source import INDEX, WEIGHTS, files_like

_ID = re.compile(r"(?P<id>\w[\w.-]*/\w[\w.-]*)(@(?P<revision>[^@\s]+))?", re.ASCII)
_TEXTS = ("*.json", "*.txt", "*.model", "*.jinja")
_PICKLES = ("pytorch_model*.bin", "*pytorch_model.bin")
# other formats and parts of pipelines lie in folders
_BELOW = "*/*"
# Mistral's second copy of what the index lists
_COPIES = "consolidated*"


def download(where: str, *, allow_pickle: bool) -> Path:
    """The folder of a model that is named "org/name" or "org/name@revision".

    Weights are its safetensors files; pickled ones only where it has none, and if allowed.

    Raises:
        FileNotFoundError: no such name, or one that can only be a path.
        OSError: the hub cannot be reached, or does not give the model out.
    """
    match = _ID.fullmatch(where)
    if not match or Path(where).suffix in (".safetensors", ".bin", ".pt", ".pth", ".json"):
        raise FileNotFoundError(f"{where}: no such file or folder")
    ignored = [_BELOW]
    folder = _fetch(where, match, _TEXTS, ignored)
    if files_like(folder, INDEX):
        ignored.append(_COPIES)
    folder = _fetch(where, match, [*_TEXTS, WEIGHTS], ignored)
    if allow_pickle and not files_like(folder, WEIGHTS):
        folder = _fetch(where, match, [*_TEXTS, *_PICKLES], ignored)
    return folder


def _fetch(where: str, match: re.Match[str], allowed: Sequence[str], ignored: list[str]) -> Path:
    from huggingface_hub import snapshot_download

    try:
        folder = snapshot_download(
            match["id"],
            revision=match["revision"],
            allow_patterns=list(allowed),
            ignore_patterns=ignored,
        )
    except Exception as error:  # of the hub's own kinds, of its HTTP library's, which has changed
        reason = " ".join(str(error).split())
        raise OSError(
            f"{where}: no such file or folder, and the Hugging Face hub does not give it:"
            f" {type(error).__name__}: {reason}"
        ) from error
    return Path(folder)
