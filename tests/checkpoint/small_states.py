"""Small states as condu_ext makes them, with everything that a state can have, and ways to damage
a saved one so that its checksums still agree."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import condu_ext as cx
from condu_ext import storage
from condu_ext.fingerprint import file_fingerprint

SHAPES = {
    "vision.0.attn.w": (30, 7),
    "vision.0.attn.b": (9,),
    "vision.1.attn.w": (30, 7),
    "conv.w": (3, 4, 2, 5),
    "text.w": (1, 2000),
    "scale": (),
    "none": (3, 0),
}
TASKS = ("cars", "food", "pets")


def model(seed: int, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """A model with a channels_last tensor, a tied one, an integer one and a private head."""
    generator = torch.Generator().manual_seed(seed)
    made = {name: torch.randn(shape, generator=generator) for name, shape in SHAPES.items()}
    made = {name: tensor.to(dtype) for name, tensor in made.items()}
    made["conv.w"] = made["conv.w"].to(memory_format=torch.channels_last)
    made["tied"] = made["vision.0.attn.b"]
    made["head"] = torch.randn(2 + seed, 3, generator=generator, dtype=torch.float64)
    made["steps"] = torch.tensor([4, 5])
    return made


def make_state(
    *,
    rescale: Any = "global",
    dtype: torch.dtype = torch.float32,
    model_dtype: torch.dtype = torch.float32,
) -> cx.UnifiedDelta:
    """A state of the TASKS over model(0), which is recorded as "tiny"."""
    models = {task: model(k + 1, model_dtype) for k, task in enumerate(TASKS)}
    state = cx.unify(
        models,
        model(0, model_dtype),
        rule=cx.FusionRule(rescale=rescale),
        dtype=dtype,
        private=("head",),
    )
    state.record_base(model(0, model_dtype), "tiny")
    return state


def save(state: cx.UnifiedDelta, folder: Path, shard_bytes: int = 1000) -> Path:
    """Write a state, by default in several shards."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(storage, "SHARD_BYTES", shard_bytes)
        state.save(folder)
    return folder


def change_config(folder: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    """Edit a saved state's config.json."""
    config = json.loads((folder / "config.json").read_text())
    change(config)
    (folder / "config.json").write_text(json.dumps(config))


def sign(folder: Path, file: Path) -> None:
    """Make the config agree with a changed data file."""
    entry = {"size": file.stat().st_size, "xxh3": file_fingerprint(file)}
    change_config(folder, lambda config: config["files"].update({file.name: entry}))


@contextmanager
def rewritten(folder: Path, kind: str, tensor: str) -> Iterator[dict[str, Tensor]]:
    """The tensors of the first file of a kind that holds ``tensor``, to be changed; written back
    with a checksum that agrees."""
    for file in sorted(folder.glob(f"{kind}-*.safetensors")):
        if tensor in (tensors := load_file(file)):
            yield tensors
            save_file(tensors, file)
            sign(folder, file)
            return
    raise LookupError(f"no {kind} file holds {tensor!r}")


def misfit(folder: Path, kind: str, change: str) -> None:
    """Put a tensor of another shape or dtype into a file of a kind ("shape", "dtype"), leave it
    out ("missing"), or add another ("extra")."""
    with rewritten(folder, kind, "scale") as tensors:
        if change == "shape":
            tensors["scale"] = tensors["scale"].new_zeros(2)
        elif change == "dtype":
            tensors["scale"] = tensors["scale"].to(torch.float16)
        elif change == "missing":
            del tensors["scale"]
        else:
            tensors["more"] = torch.ones(1)
