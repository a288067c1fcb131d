"""Image and text features of a CLIP model, under whatever weights it holds at the moment.

Everything here runs without gradients and in eval mode (each module's own mode is put back
afterwards), on the device of the model's parameters, and returns float32. A surrounding autocast is
respected; normalisation is always done in float32.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, Subset, TensorDataset

from condu.decoded import Unfinished


class PromptedTask(Protocol):
    """What a text head needs of a task (see ``condu.tasks.Task``)."""

    @property
    def name(self) -> str: ...
    @property
    def classnames(self) -> tuple[str, ...]: ...
    @property
    def templates(self) -> tuple[str, ...]: ...


Tokenize = Callable[[Sequence[str]], Tensor]


@contextmanager
def inference(model: nn.Module) -> Iterator[None]:
    """No gradients, eval mode; every module's own training flag is restored, also after an
    error.
    """
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        # no_grad, not inference_mode: features and heads are kept, and may be used in a later loss
        with torch.no_grad():
            yield
    finally:
        for module, training in modes:
            module.training = training


def encode_images(
    model: Any,
    images: Dataset[Any],
    indices: Tensor | None = None,
    *,
    batch_size: int = 256,
    num_workers: int = 0,
    normalised: bool = True,
    advance: Callable[[int], None] | None = None,
) -> tuple[Tensor, Tensor]:
    """Features float32 [M, D], ``normalised`` or as the model gives them, and labels int64 [M],
    both on the CPU, of a map-style dataset of (image tensor, label); with ``indices`` int64 [M]
    only of those images, in that order. M must not be 0. A ``TensorDataset`` is sliced a batch at a
    time, anything else goes through a DataLoader; what is ``Unfinished`` is finished on the model's
    device. ``advance`` is called after each batch with how many images it had.
    """
    source, finish = images, None
    if isinstance(images, Unfinished):
        source, finish = images.source, images.finish
    device = next(model.parameters()).device
    features, labels = [], []
    with inference(model):
        for batch, batch_labels in _batches(source, indices, batch_size, num_workers):
            batch = batch.to(device, non_blocking=True)
            found = model.encode_image(batch if finish is None else finish(batch)).float()
            features.append(F.normalize(found, dim=-1) if normalised else found)
            labels.append(batch_labels)
            if advance is not None:
                advance(len(batch_labels))
    return torch.cat(features).cpu(), torch.cat(labels).cpu()


def prompt_tokens(tokenize: Tokenize, task: PromptedTask) -> Tensor:
    """Tokens int64 [classes, templates, context] of every class name in every template."""
    prompts = [template.format(name) for name in task.classnames for template in task.templates]
    if not prompts:
        raise ValueError(f"task {task.name!r} has no class names or no templates")
    return tokenize(prompts).unflatten(0, (len(task.classnames), len(task.templates)))


def mean_text_features(
    model: Any, tokens: Tensor, *, batch_size: int = 256, normalised: bool = True
) -> Tensor:
    """Per class the mean over templates of the text features, each ``normalised`` or as the model
    gives it: tokens [classes, templates, context] to float32 [classes, D] on the CPU. Not
    normalised again: this is what prototypes take.
    """
    device = next(model.parameters()).device
    with inference(model):
        batches = [
            model.encode_text(batch.to(device)).float()
            for batch in tokens.flatten(0, 1).split(batch_size)
        ]
    features = torch.cat(batches)
    if normalised:
        features = F.normalize(features, dim=-1)
    return features.unflatten(0, tokens.shape[:2]).mean(dim=1).cpu()


def zero_shot_head(
    model: Any, tokenize: Tokenize, task: PromptedTask, *, batch_size: int = 256
) -> Tensor:
    """Zero-shot classifier [classes, D], float32 on the CPU: all templates, each text feature
    normalised, mean, normalised.
    """
    tokens = prompt_tokens(tokenize, task)
    return F.normalize(mean_text_features(model, tokens, batch_size=batch_size), dim=-1)


def _batches(
    images: Dataset[Any], indices: Tensor | None, batch_size: int, num_workers: int
) -> Iterable[tuple[Tensor, Tensor]]:
    if isinstance(images, TensorDataset):
        rows = torch.arange(len(images)) if indices is None else indices
        return (images[part] for part in rows.split(batch_size))
    chosen = images if indices is None else Subset(images, indices.tolist())
    return DataLoader(chosen, batch_size=batch_size, num_workers=num_workers)
