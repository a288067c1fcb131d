"""Distillation in CLIP's image–text space: answer reference images as an earlier model does.

ZSCL, arXiv 2303.06628 (equations 3–5): with the logits Z = s·f(x)·Eᵀ of reference images x against
the reference texts' features E, of which the teacher's are used on both sides, the loss is
T²·CE(softmax(Z_teacher / T), Z / T) over the texts of each image, and the same of Zᵀ over the
images of each text.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from condu.features import mean_text_features

if TYPE_CHECKING:
    from condu.models.clip import ClipModel


def distillation_loss(teacher: Tensor, logits: Tensor, temperature: float) -> Tensor:
    """T²·CE(softmax(teacher / T), logits / T), mean over the rows of float [N, M]: a 0-dim tensor.
    The factor keeps the size of gradients (Hinton et al., arXiv 1503.02531)."""
    target = F.softmax(teacher / temperature, dim=1)
    return temperature**2 * F.cross_entropy(logits / temperature, target)


class Distillation:
    """A copy of what a CLIP model is now, as a teacher of what it is going to be.

    texts: the reference texts. Their features are computed here, once.
    """

    def __init__(
        self, live: ClipModel, texts: Sequence[str], *, temperature: float, batch_size: int = 256
    ) -> None:
        self._teacher: Any = copy.deepcopy(live.model).eval().requires_grad_(False)
        self._temperature = temperature
        tokens = live.tokenize(texts).unsqueeze(1)
        text = mean_text_features(self._teacher, tokens, batch_size=batch_size)
        self._text = text.to(next(self._teacher.parameters()).device)

    def __call__(self, model: nn.Module, pixels: Tensor) -> Tensor:
        """The loss, a 0-dim tensor, of a model, which may be wrapped, on reference images [N, 3, H,
        W] on the device of the teacher: of images over texts plus of texts over images.

        Of several processes each brings its part of the images and has the loss of all of them, so
        that their number changes nothing: the mean of their gradients is the gradient.
        """
        with torch.no_grad():
            teacher = self._logits(self._teacher, pixels)
        logits = self._logits(model, pixels)
        return distillation_loss(teacher, logits, self._temperature) + distillation_loss(
            teacher.T, logits.T, self._temperature
        )

    def _logits(self, model: Any, pixels: Tensor) -> Tensor:
        features, _, scale = model(image=pixels)[:3]
        return scale * _of_all_processes(features.float()) @ self._text.T


def _of_all_processes(features: Tensor) -> Tensor:
    """[N, D] of each process to [P·N, D] in all, with a gradient of P times that of the process's
    own: the mean over processes is then that of all."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return features
    own, processes = features.detach().contiguous(), dist.get_world_size()
    parts = [torch.empty_like(own) for _ in range(processes)]
    dist.all_gather(parts, own)
    parts[dist.get_rank()] = features + (processes - 1) * (features - own)  # the value is own's
    return torch.cat(parts)
