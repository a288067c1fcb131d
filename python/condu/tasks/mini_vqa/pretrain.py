"""Pretrain the mini VQA model on rendered questions: ``python -m condu.tasks.mini_vqa.pretrain``.

The vision tower starts as the mini CLIP's without its last layer, as LLaVA reads CLIP's layer
before the last; projector and language model start from scratch, and all of it is trained. The
defaults are the recipe of the shipped weights (see assets/MODEL_CARD.md). Every batch is fresh: no
image is ever seen twice.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset

from condu.models.clip import load_clip
from condu.models.llava import VqaModel, answer_loss
from condu.tasks.mini.model import image_tensor, save_weights
from condu.tasks.mini.pretrain import rate_factor
from condu.tasks.mini_vqa.corpus import Turn, sample_conversations
from condu.tasks.mini_vqa.model import IMAGE, build_vqa, copy_vision_tower

STEPS = 3000
BATCH = 64
LEARNING_RATE = 1e-3
WEIGHT_DECAY = 0.05
CORPUS_STREAM = 0x767161  # keeps the corpus's random stream apart from every task's
LOG_EVERY = 100  # steps
CHUNK = 8  # batches rendered at a time


class Corpus(IterableDataset[dict[str, Tensor]]):
    """Endless fresh batches of conversations, as ``vqa.collate`` makes them."""

    def __init__(self, vqa: VqaModel, batch: int, seed: int) -> None:
        self.vqa = vqa
        self.batch = batch
        self.seed = seed

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        rng = np.random.default_rng([self.seed, CORPUS_STREAM])
        while True:
            images, conversations = sample_conversations(rng, CHUNK * self.batch)
            pixels = image_tensor(images)
            samples = list(map(self._sample, pixels, conversations))
            for start in range(0, len(samples), self.batch):
                yield self.vqa.collate(samples[start : start + self.batch])

    def _sample(self, pixels: Tensor, turns: list[Turn]) -> dict[str, Tensor]:
        """All turns in one sequence, the image before the first."""
        later = replace(self.vqa, prompt=self.vqa.prompt.replace(IMAGE, ""))
        parts = [
            vqa.sample(pixels, *turn)
            for vqa, turn in zip((self.vqa, *[later] * len(turns)), turns, strict=False)
        ]
        return {
            "pixel_values": pixels,
            "input_ids": torch.cat([part["input_ids"] for part in parts]),
            "labels": torch.cat([part["labels"] for part in parts]),
        }


def pretrain(steps: int, batch: int, seed: int, out: Path) -> None:
    """Train and write fp16 weights to ``out``; prints the loss as it goes."""
    out.parent.mkdir(parents=True, exist_ok=True)  # fails now rather than after the training
    torch.manual_seed(seed)
    vqa = build_vqa()
    model: Any = vqa.model.train()
    clip: Any = load_clip("mini").model
    copy_vision_tower(clip.visual, model.model.vision_tower)
    # torch's own attention has no fast backward in bfloat16 on a CPU
    model.set_attn_implementation("eager")
    optimizer = torch.optim.AdamW(
        model.parameters(), LEARNING_RATE, betas=(0.9, 0.98), weight_decay=WEIGHT_DECAY
    )
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: rate_factor(step, steps))
    # drawn by a worker, so that no step waits for its images
    corpus = DataLoader(Corpus(vqa, batch, seed), batch_size=None, num_workers=1)
    started, total = time.perf_counter(), 0.0
    for step, samples in enumerate(islice(corpus, steps), start=1):
        with torch.autocast("cpu", torch.bfloat16):
            loss = answer_loss(model, samples)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        total += loss.item()
        if step % LOG_EVERY == 0 or step == steps:
            mean = total / (step % LOG_EVERY or LOG_EVERY)
            print(f"step {step} loss {mean:.3f} {time.perf_counter() - started:.0f} s", flush=True)
            total = 0.0
    save_weights(model, out)


def main() -> None:
    parser = argparse.ArgumentParser(description="Pretrain the mini VQA model.")
    parser.add_argument("--out", type=Path, required=True, help="safetensors file to write")
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--batch", type=int, default=BATCH)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    if args.steps < 1 or args.batch < 1:
        parser.error(f"need --steps >= 1 and --batch >= 1, got {args.steps} and {args.batch}")
    pretrain(args.steps, args.batch, args.seed, args.out)


if __name__ == "__main__":
    main()
