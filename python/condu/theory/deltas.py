"""Where deltas come from: fine-tuned models in files, and random ones of the same scale.

A delta is one float32 vector [N] here, all fine-tuned parameters of a model in a row: the paper's
rescaler is a quotient of sums over all of them. One delta is in memory when it is asked for.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from safetensors import safe_open
from torch import Tensor

from condu.training import task_seed

NAME = "delta"
"""The one tensor of a delta, where functions of `condu_ext` want tensors by name."""


class Deltas(Protocol):
    """Deltas [N] of `names`, one for each."""

    @property
    def names(self) -> Sequence[str]: ...

    def __getitem__(self, index: int) -> Tensor: ...


@dataclass(frozen=True)
class FineTunedDeltas:
    """θ − θ_0 of models in safetensors files.

    names, files: one for each model. pretrained: θ_0 of the fine-tuned parameters by name.
    """

    names: Sequence[str]
    files: Sequence[Path]
    pretrained: Mapping[str, Tensor]

    def __getitem__(self, index: int) -> Tensor:
        """Delta [N] of one model, float32. ValueError naming the file and the tensor if it lacks
        one or has it in another shape."""
        path, parts = self.files[index], []
        with safe_open(path, framework="pt") as file:
            stored = set(file.keys())
            for name, theta_0 in self.pretrained.items():
                if name not in stored:
                    raise ValueError(f"{path}: there is no tensor {name!r}")
                theta = file.get_tensor(name)
                if theta.shape != theta_0.shape:
                    raise ValueError(
                        f"{path}, tensor {name!r}: the shape is {list(theta.shape)}, the pretrained"
                        f" model's is {list(theta_0.shape)}"
                    )
                parts.append((theta.float() - theta_0.float()).flatten())
        return torch.cat(parts)

    def scale(self) -> Tensor:
        """[N]: the root mean square of each tensor's deltas over all models, at its elements."""
        sizes = [tensor.numel() for tensor in self.pretrained.values()]
        squares = torch.zeros(len(sizes), dtype=torch.float64)
        for index in range(len(self.names)):
            parts = self[index].split(sizes)
            squares += torch.stack([part.double().square().mean() for part in parts])
        rms = (squares / len(self.names)).sqrt().float()
        return torch.repeat_interleave(rms, torch.tensor(sizes))


@dataclass(frozen=True)
class RandomDeltas:
    """Independent Gaussian deltas: the elements of `scale` [N] are standard deviations."""

    count: int
    scale: Tensor
    seed: int

    @property
    def names(self) -> Sequence[str]:
        return [f"random {index}" for index in range(self.count)]

    def __getitem__(self, index: int) -> Tensor:
        generator = torch.Generator().manual_seed(task_seed(self.seed, self.names[index]))
        return torch.randn(len(self.scale), generator=generator).mul_(self.scale)


@dataclass(frozen=True)
class SampledDeltas:
    """Some elements of other deltas: those at `index`, int64 [n]."""

    deltas: Deltas
    index: Tensor

    @classmethod
    def draw(cls, deltas: Deltas, elements: int, number: int, seed: int) -> SampledDeltas:
        """At most `number` of `elements` elements, without replacement, in their order."""
        generator = torch.Generator().manual_seed(seed)
        drawn = torch.randperm(elements, generator=generator)[:number]
        return cls(deltas, drawn.sort().values)

    @property
    def names(self) -> Sequence[str]:
        return self.deltas.names

    def __getitem__(self, index: int) -> Tensor:
        return self.deltas[index][self.index]
