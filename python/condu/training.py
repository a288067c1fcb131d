"""Fine-tuning a CLIP model on one task.

AdamW on both towers with `logit_scale` frozen, cross-entropy of exp(logit_scale)·image·textᵀ with
label smoothing, text from the task's first prompt template (ConDU, arXiv 2503.10705, and its code).
Runs on whatever device, precision and number of processes the `Accelerator` stands for.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
import xxhash
from accelerate.utils import set_seed
from torch.utils.data import DataLoader, RandomSampler

from condu.config import TrainingConfig
from condu.progress import RunProgress

if TYPE_CHECKING:
    from accelerate import Accelerator

    from condu.models.clip import ClipModel
    from condu.tasks.benchmark import Task

FROZEN = ("logit_scale", "logit_bias")


def learning_rate(step: int, *, steps: int, warmup: int, peak: float) -> float:
    """Learning rate of a step in 0 … steps − 1: linear to `peak` over the first `warmup` steps,
    which count from 1 so that no step is wasted at 0, then half a cosine that would reach 0 at
    step number `steps`."""
    if step < warmup:
        return peak * (step + 1) / warmup
    return peak * 0.5 * (1 + math.cos(math.pi * (step - warmup) / (steps - warmup)))


def task_seed(seed: int, task: str) -> int:
    """The seed of one fine-tuning: it depends on the run's seed and the task's name only, so a
    fine-tuning gives the same weights whatever was trained before it in this process."""
    return int(xxhash.xxh32_intdigest(f"{seed}/{task}".encode()))


def finetune(
    clip: ClipModel,
    task: Task,
    training: TrainingConfig,
    accelerator: Accelerator,
    *,
    seed: int,
    progress: RunProgress,
) -> float:
    """Fine-tune the live model on a task from the weights it has; returns the mean loss of the last
    tenth of the steps. `training.batch_size` is the whole batch, over all processes. Raises
    `FloatingPointError` when the loss is no longer finite: such weights must not be fused."""
    set_seed(task_seed(seed, task.name))
    images = _batches(clip, task, training, seed=task_seed(seed, task.name))
    prompts = clip.tokenize([task.templates[0].format(name) for name in task.classnames])
    prompts = prompts.to(accelerator.device)
    for name, parameter in clip.model.named_parameters():
        parameter.requires_grad_(name.rpartition(".")[2] not in FROZEN)
    peak, warmup = training.learning_rate_of(task.name), round(training.warmup * training.steps)
    optimizer = torch.optim.AdamW(
        [parameter for parameter in clip.model.parameters() if parameter.requires_grad],
        lr=peak,
        betas=training.betas,
        weight_decay=training.weight_decay,
    )
    model, optimizer, images = accelerator.prepare(clip.model, optimizer, images)
    model.train()
    losses = []
    with progress.steps(f"fine-tuning on {task.name}", training.steps) as advance:
        for step, (pixels, labels) in enumerate(images):
            rate = learning_rate(step, steps=training.steps, warmup=warmup, peak=peak)
            for group in optimizer.param_groups:
                group["lr"] = rate
            image, text, scale = model(pixels, prompts)[:3]
            loss = F.cross_entropy(
                scale * image @ text.T, labels, label_smoothing=training.label_smoothing
            )
            optimizer.zero_grad()
            accelerator.backward(loss)
            optimizer.step()
            losses.append(loss.item())
            if not math.isfinite(losses[-1]):
                raise FloatingPointError(
                    f"task {task.name!r}: the loss is {losses[-1]} at step {step + 1} of "
                    f"{training.steps}, with a learning rate of {rate:g}; try a lower one"
                )
            advance(losses[-1])
    accelerator.unwrap_model(model, keep_fp32_wrapper=False).eval()
    accelerator.free_memory()
    tail = losses[-max(1, len(losses) // 10) :]
    return sum(tail) / len(tail)


def _batches(
    clip: ClipModel, task: Task, training: TrainingConfig, *, seed: int
) -> DataLoader[tuple[torch.Tensor, int]]:
    """Exactly `training.steps` full batches: the training set, shuffled anew each time round."""
    dataset = task.dataset("train", clip.train_transform)
    generator = torch.Generator().manual_seed(seed)
    sampler = RandomSampler(
        dataset, num_samples=training.steps * training.batch_size, generator=generator
    )
    return DataLoader(dataset, training.batch_size, sampler=sampler, generator=generator)
