"""Whole sets of weights: in a live model, and in a file that says what made them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from condu_ext.files import replace


def copy_weights(model: nn.Module) -> dict[str, Tensor]:
    """A copy of all parameters and persistent buffers of a model, on the CPU."""
    return {
        name: value.detach().to("cpu", copy=True, memory_format=torch.contiguous_format)
        for name, value in model.state_dict().items()
    }


@contextmanager
def weights_in(model: nn.Module, weights: Mapping[str, Tensor]) -> Iterator[None]:
    """Put `weights` into a live model (names that it does not give keep their values), and the
    model's own back afterwards, whatever happens meanwhile."""
    before = copy_weights(model)
    try:
        model.load_state_dict({**before, **weights})
        yield
    finally:
        model.load_state_dict(before)


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
