"""Checkpoints without an architecture, whose tensors end before, on and behind chunk borders."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import condu_ext as cx
from condu_ext.layout import CHUNK

SHAPES = {
    "wide": (3, CHUNK + 7),
    "whole": (2, CHUNK),
    "matrix": (300, 41),
    "bias": (17,),
    "scalar": (),
    "nothing": (0, 4),
}


def model(seed: int, *, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """A base model with an integer tensor."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {
        name: (0.1 * torch.randn(shape, generator=generator)).to(dtype)
        for name, shape in SHAPES.items()
    }
    return tensors | {"steps": torch.arange(5)}


def moved(base: Mapping[str, Tensor], seed: int, *, coarse: bool = True) -> dict[str, Tensor]:
    """A fine-tuned model; ``coarse``: by few different amounts, whose sums are often 0."""
    generator = torch.Generator().manual_seed(1000 + seed)
    result = {}
    for name, tensor in base.items():
        if not tensor.is_floating_point():
            result[name] = tensor.clone()
            continue
        noise = torch.randn(tensor.shape, generator=generator)
        step = (2 * noise).round() / 1024 if coarse else 1e-3 * noise
        result[name] = (tensor.float() + step).to(tensor.dtype)
    return result


def save(tensors: Mapping[str, Tensor], file: Path) -> Path:
    """Write a model into one file."""
    file.parent.mkdir(parents=True, exist_ok=True)
    save_file(dict(tensors), file, metadata={"format": "pt"})
    return file


def load(where: Path) -> dict[str, Tensor]:
    """The tensors of a file, or of all in a folder."""
    files = sorted(where.glob("*.safetensors")) if where.is_dir() else [where]
    return {name: tensor for file in files for name, tensor in load_file(file).items()}


def assert_same(found: Path | cx.UnifiedDelta, expected: cx.UnifiedDelta) -> None:
    """Two states are equal, bit for bit, in all that they hold."""
    state = found if isinstance(found, cx.UnifiedDelta) else cx.UnifiedDelta.load(found)
    assert state.tasks == expected.tasks
    assert (state.rule, state.dtype) == (expected.rule, expected.dtype)
    assert state.base_fingerprints == expected.base_fingerprints
    for name, delta in expected.delta.items():
        assert torch.equal(state.delta[name], delta), name
    for task in expected.tasks:
        assert state.rescaler(task) == expected.rescaler(task), task
        for name, bits in expected.packed_mask(task).items():
            assert torch.equal(state.packed_mask(task)[name], bits), (task, name)
        private = state.private(task)
        assert private.keys() == expected.private(task).keys()
        for name, tensor in expected.private(task).items():
            assert torch.equal(private[name], tensor), (task, name)
    assert sums(state) == sums(expected)


def sums(state: cx.UnifiedDelta) -> dict[str, list[list[float]]]:
    """num and den of all tasks by tensor."""
    (arena,) = state.arenas
    return {
        state.spec.tensors[k].name: [arena.num[:, n].tolist(), arena.den[:, n].tolist()]
        for n, k in enumerate(arena.index)
    }


def data_bytes(state: Path) -> dict[str, bytes]:
    """Name → content of all that belongs to a state."""
    return {file.name: file.read_bytes() for file in state.iterdir() if file.name != ".lock"}
