"""Dual RAIL: kernel ridge regression on the features of all images so far, which are stored.

arXiv 2406.18868.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from condu.bench.memory import available_memory
from condu.config import ConfigError
from condu.methods.base import register
from condu.methods.rail import Rail
from condu.weights import load_weights, save_weights

if TYPE_CHECKING:
    from condu.workspace import Workspace

BATCH = 1024
"""Images that are answered at a time: a row of the kernel each."""


class KernelRidge:
    """α [N, C] = (K + ridge·1)⁻¹Y over all N images so far, in float64, for K = exp(−gamma·‖x −
    x'‖²) and one-hot Y; an image is answered by its row of the kernel times α.

    A task adds rows to the Cholesky factor of K + ridge·1 and changes none, so it costs what it
    adds; the result equals that for all images at once. Takes 8·N² bytes, and more while it grows:
    `peak_bytes`.
    """

    @staticmethod
    def peak_bytes(tasks: Sequence[int]) -> int:
        """The most that matrices take while so many images of one task after another are absorbed
        and answered: the factor of all and a copy of it, for LAPACK wants columns in a row, and
        what is there of the old images alone and of the new ones."""
        totals = accumulate(tasks)
        return max(
            8 * (2 * total**2 + (total - new) ** 2 + new**2)
            for total, new in zip(totals, tasks, strict=True)
        )

    def __init__(self, gamma: float, ridge: float, *, device: torch.device) -> None:
        self._gamma, self._ridge, self._device = gamma, ridge, device
        self._features = torch.zeros(0, 0, dtype=torch.float64, device=device)
        self._labels = torch.zeros(0, dtype=torch.int64, device=device)
        self._factor = torch.zeros(0, 0, dtype=torch.float64, device=device)
        self._alpha: Tensor | None = None

    def __len__(self) -> int:
        """Number of images."""
        return len(self._labels)

    def absorb(self, features: Tensor, labels: Tensor) -> None:
        """Learn features [M, D] with labels int64 [M]."""
        new = features.to(self._device, torch.float64)
        known, count = len(self), len(new)
        factor = F.pad(self._factor, (0, count, 0, count))
        corner = self._kernel(new, new)
        corner.diagonal().add_(self._ridge)
        if known:
            # rows below the old factor L: with B = K(new, old), solve side·Lᵀ = B
            factor[known:, :known] = torch.linalg.solve_triangular(
                self._factor.T, self._kernel(new, self._features), upper=True, left=False
            )
            side = factor[known:, :known]
            corner.addmm_(side, side.T, alpha=-1)
        factor[known:, known:] = torch.linalg.cholesky(corner)
        self._features = torch.cat([self._features, new]) if known else new
        self._labels = torch.cat([self._labels, labels.to(self._device)])
        self._factor, self._alpha = factor, None

    def scores(self, features: Tensor, classes: int) -> Tensor:
        """Answers float64 [M, classes] on the CPU."""
        if self._alpha is None or self._alpha.shape[1] != classes:
            target = F.one_hot(self._labels, classes).double()
            self._alpha = torch.cholesky_solve(target, self._factor)
        parts = [
            self._kernel(batch.to(self._features), self._features) @ self._alpha
            for batch in features.split(BATCH)
        ]
        return torch.cat(parts).cpu()

    def _kernel(self, rows: Tensor, columns: Tensor) -> Tensor:
        squares = (rows @ columns.T).mul_(-2)
        squares.add_(rows.square().sum(1, keepdim=True)).add_(columns.square().sum(1))
        return squares.clamp_(min=0).mul_(-self._gamma).exp_()


@register
class RailDual(Rail):
    """Keeps the features of each task's images on disk. The kernel has a row and a column for each
    image: it is meant for few-shot data, 16 images of MTIL's 1201 classes taking 3 GB, and three
    times that while they are absorbed."""

    name: ClassVar[str] = "rail_dual"

    def __init__(self, workspace: Workspace) -> None:
        """Raises ConfigError where the system would end the process at one of the tasks."""
        super().__init__(workspace)
        counts = [len(task.load("train")) for task in workspace.benchmark]
        free = available_memory(workspace.accelerator.device)
        if (needed := KernelRidge.peak_bytes(counts)) > free:
            raise ConfigError(
                f"methods: 'rail_dual' needs {needed / 2**30:.1f} GiB for the kernel of "
                f"{sum(counts)} training images, and {free / 2**30:.1f} GiB are free: take fewer "
                "images, or 'rail_primal'"
            )

    def absorb(self, index: int) -> None:
        file = self._file(index)
        if not file.exists():
            features, labels = self.features(index)
            save_weights(file, {"features": features, "labels": labels})
        while self._absorbed <= index:  # more than one after a restart
            stored = load_weights(self._file(self._absorbed))
            self._kernel.absorb(stored["features"], stored["labels"])
            self._absorbed += 1

    def adapter(self, features: Tensor) -> Tensor:
        return self._kernel.scores(features, self.offsets[self._absorbed])

    _absorbed = 0
    """Tasks in the kernel."""

    @cached_property
    def _kernel(self) -> KernelRidge:
        config = self.workspace.config.rail
        device = self.workspace.accelerator.device
        return KernelRidge(config.gamma, config.kernel_ridge, device=device)

    def _file(self, index: int) -> Path:
        return self.folder / f"{index:03d}.safetensors"
