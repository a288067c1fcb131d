"""Primal RAIL: ridge regression on random features, solved recursively; nothing is stored of the
images.

arXiv 2406.18868, and its code for how the random weights are drawn.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from condu.methods.base import register
from condu.methods.rail import Rail
from condu.weights import load_facts, load_weights, save_weights

BATCH = 1024
"""Images an update: the more, the fewer passes over the matrix R, and the larger the inverse."""


class RecursiveRidge:
    """The solution W [hidden, C] of min ‖ΦW − Y‖² + ridge·‖W‖² over all batches so far, in float64,
    for φ(x) = ReLU(x·A) and one-hot Y; equal to solving for all of them at once.

    A [dim, hidden] is drawn from ±1/√dim, as the paper's code has it; `seed` decides it. R [hidden,
    hidden] = (ΦᵀΦ + ridge·1)⁻¹ is all that is known of the images: 8·hidden² bytes.
    """

    def __init__(self, hidden: int, ridge: float, *, seed: int, device: torch.device) -> None:
        self._seed = seed
        self._random: Tensor | None = None
        self.covariance = torch.eye(hidden, dtype=torch.float64, device=device) / ridge
        self.weights = torch.zeros(hidden, 0, dtype=torch.float64, device=device)

    def absorb(self, features: Tensor, labels: Tensor, classes: int) -> None:
        """Learn features [M, dim] with labels int64 [M] of `classes` classes in all, some of which
        may be new."""
        new = classes - self.weights.shape[1]
        self.weights = F.pad(self.weights, (0, new))
        for batch, batch_labels in zip(features.split(BATCH), labels.split(BATCH), strict=True):
            self._update(self._expand(batch), batch_labels.to(self.weights.device))

    def scores(self, features: Tensor) -> Tensor:
        """φ(x)·W, float64 [M, C] on the CPU."""
        parts = [self._expand(batch) @ self.weights for batch in features.split(BATCH)]
        return torch.cat(parts).cpu()

    def state(self) -> dict[str, Tensor]:
        """What `restore` takes, beside what the object was made of."""
        return {"covariance": self.covariance, "weights": self.weights}

    def restore(self, state: Mapping[str, Tensor]) -> None:
        device = self.weights.device
        self.covariance, self.weights = (state[n].to(device) for n in ("covariance", "weights"))

    def _expand(self, features: Tensor) -> Tensor:
        if self._random is None:
            dim, hidden = features.shape[1], len(self.weights)
            generator = torch.Generator().manual_seed(self._seed)
            uniform = torch.rand(dim, hidden, generator=generator, dtype=torch.float64)
            self._random = ((2 * uniform - 1) / dim**0.5).to(self.weights.device)
        return torch.relu(features.to(self._random) @ self._random)

    def _update(self, phi: Tensor, labels: Tensor) -> None:
        """R ← R − RΦᵀ(1 + ΦRΦᵀ)⁻¹ΦR and W ← W + RΦᵀ(Y − ΦW), whose new RΦᵀ is the first product."""
        half = self.covariance @ phi.T
        inner = torch.eye(len(phi), dtype=phi.dtype, device=phi.device) + phi @ half
        gain = torch.cholesky_solve(half.T, torch.linalg.cholesky(inner)).T
        self.covariance.addmm_(gain, half.T, alpha=-1)
        error = -(phi @ self.weights)
        error[torch.arange(len(labels), device=labels.device), labels] += 1
        self.weights.addmm_(gain, error)


@register
class RailPrimal(Rail):
    """Keeps R and W on disk after each task."""

    name: ClassVar[str] = "rail_primal"

    def absorb(self, index: int) -> None:
        task = self.workspace.benchmark.tasks[index].name
        if self._file.exists() and load_facts(self._file)["task"] == task:
            return  # a kill came after this very step
        features, labels = self.features(index)
        self._ridge.absorb(features, labels, self.offsets[index + 1])
        save_weights(self._file, self._ridge.state(), task=task)

    def adapter(self, features: Tensor) -> Tensor:
        return self._ridge.scores(features)

    @cached_property
    def _ridge(self) -> RecursiveRidge:
        """As it is on disk, or new."""
        config = self.workspace.config
        ridge = RecursiveRidge(
            config.rail.hidden,
            config.rail.ridge,
            seed=config.seed,
            device=self.workspace.accelerator.device,
        )
        if self._file.exists():
            ridge.restore(load_weights(self._file))
        return ridge

    @property
    def _file(self) -> Path:
        return self.folder / "ridge.safetensors"
