"""A model in files of ``torch.save``, read with ``torch.load(weights_only=True, mmap=True)``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from condu.checkpoint.safetensors_source import check_listed, files_like, read_index
from condu.checkpoint.tensor_files import Stored
from condu.live import canonical_name

UNDER = ("state_dict", "model")
"""Where a training run's checkpoint keeps the model, beside optimizer, epoch and so on."""
_FIRST = "pytorch_model.bin"
_FIRST_INDEX = "pytorch_model.bin.index.json"
_WEIGHTS = "*pytorch_model*.bin"


class PickledSource:
    """The tensors of pickled files, mapped into memory (a ``condu.checkpoint.sources.Source``): the
    files must not be cut off while they are read.

    A file holds tensors by name, or has them under "state_dict" or "model". Names lose what
    wrappers add (``module.``, ``_orig_mod.``). Of tied tensors the first name stays, as in
    safetensors files.

    folder: of a Hugging Face folder, its path.

    Raises:
        OSError: a file is missing or cannot be read.
        ValueError: pickles are not allowed; a damaged file, one that holds anything else than
            dense tensors, or of a format that cannot be mapped; an index that does not fit.
    """

    is_delta: ClassVar[bool] = False
    staged: ClassVar[int] = 0
    largest_part: ClassVar[int] = 0

    def __init__(
        self,
        where: str,
        files: Sequence[Path],
        *,
        allow_pickle: bool,
        folder: Path | None = None,
        index: Path | None = None,
    ) -> None:
        if not allow_pickle:
            raise ValueError(
                f"{index or files[0]}: the weights are pickled, and a pickle can run anything when"
                " it is read; allow_pickle=True (--allow-pickle) reads it with weights_only=True,"
                " which runs nothing"
            )
        listed = read_index(index) if index else {}
        self.where, self.folder = where, folder
        self.files: Sequence[Path] = sorted(set(listed.values())) or list(files)
        held: dict[str, tuple[Path, Tensor]] = {}
        for file in self.files:
            for name, tensor in _read(file).items():
                if name in held:
                    raise ValueError(f"tensor {name!r} is in {held[name][0]} and in {file}")
                held[name] = file, tensor
        if index:
            check_listed(index, listed, {name: file for name, (file, _) in held.items()})
        self._values = _untied({name: tensor for name, (_, tensor) in held.items()})
        self.tensors: Mapping[str, Stored] = {
            name: Stored(name, tensor.dtype, tuple(tensor.shape))
            for name, tensor in self._values.items()
        }

    @classmethod
    def of_folder(cls, where: str, folder: Path, *, allow_pickle: bool) -> PickledSource | None:
        """The pickled model in a Hugging Face folder; None if there is none.

        ``pytorch_model.bin``, else its index, else the one file that is named like it.
        """
        files, index = files_like(folder, _WEIGHTS), folder / _FIRST_INDEX
        if folder / _FIRST in files:
            files = [folder / _FIRST]
        elif index.is_file():
            return cls(where, [], allow_pickle=allow_pickle, folder=folder, index=index)
        if not files:
            return None
        if len(files) > 1:
            names = ", ".join(file.name for file in files)
            raise ValueError(f"{folder}: holds several models ({names}), name the one to read")
        return cls(where, files, allow_pickle=allow_pickle, folder=folder)

    def read(self, name: str, start: int, stop: int, out: Tensor) -> None:
        copy_range(self._values[name], start, stop, out)

    def close(self) -> None:
        self._values = {}


def copy_range(tensor: Tensor, start: int, stop: int, out: Tensor) -> None:
    """Elements [start, stop) of a tensor of any strides, in row-major order, into the first of
    flat ``out``; without a copy of the rest."""
    if tensor.is_contiguous():
        out[: stop - start].copy_(tensor.view(-1)[start:stop])
    elif stop > start:
        row = tensor[0].numel()
        first, last = -(-start // row), stop // row  # the rows that are wanted whole
        if first > last:  # a part of one row
            copy_range(tensor[last], start - last * row, stop - last * row, out)
            return
        if start < first * row:
            copy_range(tensor[first - 1], start - (first - 1) * row, row, out)
        rows = tensor[first:last]
        out[first * row - start : last * row - start].view(rows.shape).copy_(rows)
        if last * row < stop:
            copy_range(tensor[last], 0, stop - last * row, out[last * row - start :])


def _read(file: Path) -> dict[str, Tensor]:
    """The tensors of a file, mapped, by canonical name."""
    content = _load(file)
    if isinstance(content, Mapping):
        nested = [content[key] for key in UNDER if isinstance(content.get(key), Mapping)]
        content = nested[0] if nested else content
    if not isinstance(content, Mapping) or not content:
        raise ValueError(f"{file}: is {_kind(content)}, expected tensors by name")
    tensors: dict[str, Tensor] = {}
    for name, value in content.items():
        if not isinstance(name, str) or not _is_dense(value):
            raise ValueError(
                f"{file}: entry {name!r} is {_kind(value)}, not a dense tensor; a model is tensors"
                " by name, or has them under 'state_dict' or 'model'"
            )
        canonical = canonical_name(name)
        if canonical in tensors:
            raise ValueError(f"{file}: two tensors have the same canonical name {canonical!r}")
        tensors[canonical] = value.detach()
    return tensors


def _load(file: Path) -> Any:
    try:
        return torch.load(file, map_location="cpu", weights_only=True, mmap=True)
    except OSError:
        raise
    except Exception as error:  # a damaged pickle can fail as anything
        if "mmap can only be used" in str(error):
            raise ValueError(
                f"{file}: is in the format of torch before 1.6, which cannot be read by parts:"
                " load it and save it again"
            ) from None
        raise ValueError(f"{file}: torch.load cannot read it ({reason(error)})") from None


def reason(error: Exception) -> str:
    """The first sentence of what torch says is wrong, on one line."""
    text = str(error).rpartition("WeightsUnpickler error: ")[2]
    if text.startswith("Weights only load failed"):  # first it says how to read it all the same
        text = text.partition("\n\n")[2] or text
    text = text.strip().split("\n\n")[0].split(". ")[0]
    return " ".join(text.split()) or type(error).__name__


def _is_dense(value: object) -> bool:
    return (
        type(value) in (Tensor, torch.nn.Parameter)
        and isinstance(value, Tensor)
        and value.layout is torch.strided
        and value.device.type == "cpu"
        and not value.is_quantized
    )


def _kind(value: object) -> str:
    if isinstance(value, Tensor):
        return f"a {value.layout} {type(value).__name__} of {value.dtype} on {value.device}"
    return "empty" if value == {} else f"of type {type(value).__name__}"


def _untied(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Of tensors that share their memory the first alone."""
    seen: set[tuple[object, ...]] = set()
    kept = {}
    for name, tensor in tensors.items():
        place = (tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride())
        if tensor.numel() == 0 or place not in seen:
            kept[name] = tensor
        seen.add(place)
    return kept
