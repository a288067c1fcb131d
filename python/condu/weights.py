"""Whole sets of weights: in a live model, and in a file that says what made them."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from condu_ext.files import replace


def copy_weights(model: nn.Module, names: Collection[str] | None = None) -> dict[str, Tensor]:
    """Copies on the CPU of a model's parameters and persistent buffers, or of the named ones."""
    return {
        name: value.detach().to("cpu", copy=True, memory_format=torch.contiguous_format)
        for name, value in model.state_dict().items()
        if names is None or name in names
    }


def put_weights(model: nn.Module, weights: Mapping[str, Tensor]) -> None:
    """Write `weights` into a live model; KeyError for a name that it does not have."""
    unknown = model.load_state_dict(weights, strict=False).unexpected_keys
    if unknown:
        raise KeyError(f"the model has no tensor {unknown[0]!r}")


@contextmanager
def weights_in(
    model: nn.Module, weights: Mapping[str, Tensor], names: Collection[str] | None = None
) -> Iterator[None]:
    """Put `weights` into a live model, and its own back afterwards, whatever happens meanwhile:
    those called `names`, or all."""
    before = copy_weights(model, names)
    try:
        put_weights(model, weights)
        yield
    finally:
        put_weights(model, before)


def save_weights(path: Path, weights: Mapping[str, Tensor], **facts: str) -> None:
    """Write a safetensors file as one step, with `facts` in its header."""
    replace(path, lambda temporary: save_file(dict(weights), temporary, metadata=facts))


def load_weights(path: Path) -> dict[str, Tensor]:
    """The weights in a file that `save_weights` wrote."""
    with safe_open(path, framework="pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118, not a dict


def load_facts(path: Path) -> dict[str, str]:
    """The facts in the header of a file that `save_weights` wrote; the tensors are not read."""
    with safe_open(path, framework="pt") as file:
        return dict(file.metadata() or {})
