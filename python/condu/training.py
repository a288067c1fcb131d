"""Fine-tuning a live model on one task.

AdamW on the parameters that require grad, with the loss that the model gives for the task. Runs on
whatever device, precision and number of processes the `Accelerator` stands for.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
import xxhash
from accelerate.utils import set_seed
from torch import Tensor, nn
from torch.utils.data import DataLoader, RandomSampler

from condu.config_sections import TrainingConfig
from condu.live import matches
from condu.progress import RunProgress

if TYPE_CHECKING:
    from accelerate import Accelerator

    from condu.models.base import LiveModel
    from condu.tracking import Track

AfterStep = Callable[[torch.optim.Optimizer], None]
"""Called after each step of the optimiser, which it may change, as it may the weights."""

Penalty = Callable[[nn.Module, Any], Tensor]
"""What is added to the objective, of the same module and batch."""


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


def train_all_weights(live: LiveModel) -> None:
    """Let every parameter require grad but those that fine-tuning leaves alone (`live.frozen`)."""
    for name, parameter in live.model.named_parameters():
        parameter.requires_grad_(not matches(name, live.frozen))


def finetune(
    live: LiveModel,
    task: Any,
    training: TrainingConfig,
    accelerator: Accelerator,
    *,
    seed: int,
    progress: RunProgress,
    penalty: Penalty | None = None,
    after_step: AfterStep | None = None,
    track: Track | None = None,
    workers: int = 0,
) -> float:
    """Fine-tune the live model on a task from the weights it has; returns the mean loss of the last
    tenth of the steps. `training.batch_size` is the whole batch, over all processes; `workers` more
    prepare it, and their number changes what is random in that. `track` learns of each step. Raises
    `FloatingPointError` when the loss is no longer finite: such weights must not be fused."""
    set_seed(task_seed(seed, task.name))
    batches = shuffled_batches(
        live.training_set(task),
        training.steps,
        training.batch_size,
        seed=task_seed(seed, task.name),
        collate=live.collate,
        workers=workers,
    )
    objective = live.objective(task, training.label_smoothing)
    peak, warmup = training.learning_rate_of(task.name), round(training.warmup * training.steps)
    optimizer = torch.optim.AdamW(
        [parameter for parameter in live.model.parameters() if parameter.requires_grad],
        lr=peak,
        betas=training.betas,
        weight_decay=training.weight_decay,
    )
    model, optimizer, batches = accelerator.prepare(live.model, optimizer, batches)
    model.train()
    losses = []
    with progress.steps(f"fine-tuning on {task.name}", training.steps) as advance:
        for step, batch in enumerate(batches):
            rate = learning_rate(step, steps=training.steps, warmup=warmup, peak=peak)
            for group in optimizer.param_groups:
                group["lr"] = rate
            loss = objective(model, batch)
            if penalty is not None:
                loss = loss + penalty(model, batch)
            optimizer.zero_grad()
            accelerator.backward(loss)
            optimizer.step()
            if after_step is not None:
                after_step(optimizer)
            losses.append(loss.item())
            if not math.isfinite(losses[-1]):
                raise FloatingPointError(
                    f"task {task.name!r}: the loss is {losses[-1]} at step {step + 1} of "
                    f"{training.steps}, with a learning rate of {rate:g}; try a lower one"
                )
            advance(losses[-1])
            if track is not None:
                track(step + 1, losses[-1], rate)
    accelerator.unwrap_model(model, keep_fp32_wrapper=False).eval()
    accelerator.free_memory()
    tail = losses[-max(1, len(losses) // 10) :]
    return sum(tail) / len(tail)


def shuffled_batches(
    dataset: Any,
    steps: int,
    batch_size: int,
    *,
    seed: int,
    collate: Callable[[list[Any]], Any] | None = None,
    workers: int = 0,
) -> DataLoader[Any]:
    """Exactly `steps` full batches of a map-style data set, shuffled anew each time round, prepared
    by `workers` processes."""
    generator = torch.Generator().manual_seed(seed)
    sampler = RandomSampler(dataset, num_samples=steps * batch_size, generator=generator)
    return DataLoader(
        dataset,
        batch_size,
        sampler=sampler,
        generator=generator,
        collate_fn=collate,
        num_workers=workers,
    )
