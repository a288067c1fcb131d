"""Models of the Hugging Face hub, downloaded into its cache."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from condu.checkpoint.safetensors_source import INDEX, WEIGHTS, files_like

_ID = re.compile(r"(?P<id>\w[\w.-]*/\w[\w.-]*)(@(?P<revision>[^@\s]+))?", re.ASCII)
_PICKLES = ("pytorch_model*.bin", "*pytorch_model.bin")
# the same weights once more, as torch or other programs store them; all else belongs to the model
_OF_TORCH = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl", "*.distcp", "*.nemo", "*.tar*", "*.zip")
_OF_OTHERS = ("*.h5", "*.msgpack", "*.npz", "*.ot", "*.onnx*", "*.gguf", "*.ggml", "*.tflite")
# parts of pipelines and second copies lie in folders; Mistral's second copy does not
_COPIES = ("*/*.safetensors", "consolidated*")


def download(where: str, *, allow_pickle: bool) -> Path:
    """The folder of a model that is named "org/name" or "org/name@revision".

    Weights are its safetensors files; pickled ones only where it has none, and if allowed. All
    that is no weights comes with them: configuration, tokenizer, code, licence.

    Raises:
        FileNotFoundError: no such name, or one that can only be a path; the hub cannot be reached,
            or does not give the model out.
    """
    match = _ID.fullmatch(where)
    if not match or Path(where).suffix in (".safetensors", ".bin", ".pt", ".pth", ".json"):
        raise FileNotFoundError(f"{where}: no such file or folder")
    folder = _fetch(where, match, ["*"], [*_OF_TORCH, *_OF_OTHERS, WEIGHTS])
    copies = _COPIES if files_like(folder, INDEX) else _COPIES[:1]
    folder = _fetch(where, match, [WEIGHTS], copies)
    if allow_pickle and not files_like(folder, WEIGHTS):
        folder = _fetch(where, match, _PICKLES, ["*/*"])
    return folder


def _fetch(
    where: str, match: re.Match[str], allowed: Sequence[str], ignored: Sequence[str]
) -> Path:
    from huggingface_hub import errors, snapshot_download

    try:
        folder = snapshot_download(
            match["id"],
            revision=match["revision"],
            allow_patterns=list(allowed),
            ignore_patterns=list(ignored),
        )
    except Exception as error:  # of the hub's own kinds, of its HTTP library's, which has changed
        if isinstance(error, errors.GatedRepoError):
            reason = "gives it only to those whom its owner lets"
        elif isinstance(error, (errors.RepositoryNotFoundError, errors.RevisionNotFoundError)):
            reason = "has none of that name, or a private one"
        elif isinstance(error, errors.LocalEntryNotFoundError):
            reason = "cannot be reached"
        else:
            reason = f"says {type(error).__name__}: {' '.join(str(error).split())}"
        raise FileNotFoundError(
            f"{where}: no such file or folder, and the Hugging Face hub {reason}"
        ) from error
    return Path(folder)
