"""A task's expert out of a unified checkpoint, as an adapter that PEFT loads."""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from peft import LoraConfig
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

import condu_ext as cx
from condu.adapters.absorb import check_space
from condu.adapters.folder import (
    CONFIG,
    OUTPUT_PROJECTION,
    TENSORS,
    AdapterFolder,
    exactly,
)
from condu.adapters.layers import output_projection_count
from condu.adapters.names import PREFIX
from condu_ext import UnifiedDelta
from condu_ext.files import PART, sync


@dataclass(frozen=True)
class EnergyLoss:
    """Share of ‖d̃‖² that an adapter of low rank leaves out, of all weights and of the worst."""

    total: float
    worst: float
    worst_weight: str


def extract_adapter(
    state: str | os.PathLike[str],
    task: str,
    out: str | os.PathLike[str],
    *,
    init: str | os.PathLike[str] | None = None,
    svd_rank: int | None = None,
) -> EnergyLoss | None:
    """Write a task's expert as a folder that ``PeftModel.from_pretrained`` loads.

    From a state of factors it is exact: θ̃ = θ_0 + d̃ with ``init``, the adapter saved before
    training, as θ_0. In a state of products d̃ is of full rank from the second task on, so the
    folder holds the best approximation of rank ``svd_rank`` to each weight's d̃, by an SVD. The
    weights are taken for those of ``nn.Linear`` and ``nn.MultiheadAttention``: what kind of layer
    they belong to, the state does not know.

    Args:
        out: folder to make; it must not exist. It appears complete, or not at all.

    Returns:
        What the approximation lost; None from a state of factors.

    Raises:
        KeyError: no such task. FileExistsError: ``out`` exists.
        ValueError: an option that the state's space needs or does not take; another start than the
            state's; a task with private tensors, or weights that no linear layer has.
    """
    target, path = Path(out), Path(state)
    if target.exists():
        raise FileExistsError(f"{target} exists")
    loaded = UnifiedDelta.load(path)
    loaded.position(task)
    start = None if init is None else AdapterFolder.read(init)
    check_space(loaded, path, start)
    if loaded.private(task):
        raise ValueError(
            f"task {task!r} keeps {min(loaded.private(task))!r} whole, for which an adapter has no"
            " place"
        )
    if start is not None:
        if svd_rank is not None:
            raise ValueError(f"{path} is a state of LoRA factors: leave svd_rank out")
        loaded.verify_base(start.tensors)
        _write_folder(target, start.config, cx.decouple(loaded, task, start.tensors))
        return None
    if svd_rank is None or svd_rank < 1:
        raise ValueError(
            f"{path} is a state of products, which no adapter holds exactly: svd_rank must say the"
            f" rank to cut to, from 1 on, got {svd_rank}"
        )
    config, tensors, loss = _of_low_rank(cx.decouple(loaded, task, None), svd_rank)
    config.base_model_name_or_path = loaded.base_name
    _write_folder(target, config, tensors)
    return loss


def _of_low_rank(
    deltas: Mapping[str, Tensor], rank: int
) -> tuple[LoraConfig, dict[str, Tensor], EnergyLoss]:
    attentions = {name.removesuffix(".in_proj_weight") for name in deltas} - deltas.keys()
    tensors, energy, lost, layers = {}, {}, {}, []
    for name, delta in deltas.items():
        if delta.dim() != 2:
            raise ValueError(
                f"{name!r} has {delta.dim()} dimensions, a linear layer's weight has 2"
            )
        layer = name.rpartition(".")[0]
        attention = name.removesuffix(".out_proj.weight")
        if attention in attentions:
            layer = attention + OUTPUT_PROJECTION
        else:
            layers.append(layer)
        a, b, energy[name], lost[name] = _truncated(delta, rank)
        if attention in attentions:
            b /= output_projection_count()
        tensors[f"{PREFIX}{layer}.lora_A.weight"] = a
        tensors[f"{PREFIX}{layer}.lora_B.weight"] = b
    config = LoraConfig(r=rank, lora_alpha=rank, target_modules=exactly(layers))
    shares = {name: lost[name] / energy[name] if energy[name] else 0.0 for name in deltas}
    worst = max(shares, key=lambda name: shares[name])
    total = sum(lost.values()) / (sum(energy.values()) or 1.0)
    return config, tensors, EnergyLoss(total, shares[worst], worst)


def _truncated(delta: Tensor, rank: int) -> tuple[Tensor, Tensor, float, float]:
    """A [rank, in] and B [out, rank] with B·A the closest to delta, ‖delta‖², and the part lost."""
    u, sigma, v = torch.linalg.svd(delta, full_matrices=False)
    kept = min(rank, len(sigma))
    root = sigma[:kept].sqrt()
    a = torch.zeros(rank, delta.shape[1])
    b = torch.zeros(delta.shape[0], rank)
    a[:kept] = root[:, None] * v[:kept]
    b[:, :kept] = u[:, :kept] * root
    squares = sigma.double().square()
    return a, b, squares.sum().item(), squares[kept:].sum().item()


def _write_folder(target: Path, config: LoraConfig, tensors: Mapping[str, Tensor]) -> None:
    part = target.with_name(f".{target.name}{PART}")
    shutil.rmtree(part, ignore_errors=True)  # left over by a kill
    part.mkdir(parents=True)
    try:
        config.save_pretrained(str(part))
        save_file(dict(tensors), part / TENSORS, metadata={"format": "pt"})
        for file in (part / CONFIG, part / TENSORS, part):
            sync(file)
        part.rename(target)
    except BaseException as error:
        shutil.rmtree(part, ignore_errors=True)
        if isinstance(error, SafetensorError):
            raise OSError(f"{target}: {error}") from None
        raise
    sync(target.parent)
