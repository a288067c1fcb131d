"""Pretrain the mini CLIP on rendered image–caption pairs: ``python -m condu.tasks.mini.pretrain``.

The defaults are the recipe of the shipped weights (see assets/MODEL_CARD.md). Every batch is
fresh: no image is ever seen twice.
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from condu.tasks.mini.corpus import sample_pairs
from condu.tasks.mini.model import MiniTokenizer, build_model, image_tensor, save_weights

STEPS = 6000
BATCH = 64
LEARNING_RATE = 5e-4
WARM_UP = 0.05  # share of the steps
WEIGHT_DECAY = 0.05
MAX_LOGIT_SCALE = math.log(100)
CORPUS_STREAM = 0x636F72707573  # keeps the corpus's random stream apart from every task's
LOG_EVERY = 100  # steps
CHUNK = 8  # batches rendered at a time


def batches(rng: np.random.Generator, batch: int) -> Iterator[tuple[np.ndarray, list[str]]]:
    """Endless fresh batches of (uint8 images, captions)."""
    while True:
        images, captions = sample_pairs(rng, CHUNK * batch)
        for start in range(0, len(images), batch):
            yield images[start : start + batch], captions[start : start + batch]


def contrastive_loss(logits: Tensor, caption: Tensor) -> Tensor:
    """Symmetric cross-entropy where images that share a caption are all positives of it.

    logits [images, captions], captions distinct; caption int64 [images]: each image's own.
    """
    matches = F.one_hot(caption, logits.shape[1]).T.float()
    per_caption = matches / matches.sum(dim=1, keepdim=True)
    return (F.cross_entropy(logits, caption) + F.cross_entropy(logits.T, per_caption)) / 2


def rate_factor(step: int, steps: int) -> float:
    """Linear warm-up, then a cosine to zero."""
    warm_up = max(1, round(WARM_UP * steps))
    if step < warm_up:
        return (step + 1) / warm_up
    return 0.5 * (1 + math.cos(math.pi * (step - warm_up) / max(1, steps - warm_up)))


def pretrain(steps: int, batch: int, seed: int, out: Path) -> None:
    """Train from scratch and write fp16 weights to ``out``; prints the loss as it goes."""
    torch.manual_seed(seed)
    rng = np.random.default_rng([seed, CORPUS_STREAM])
    model, tokenize = build_model().train(), MiniTokenizer()
    optimizer = torch.optim.AdamW(
        model.parameters(), LEARNING_RATE, betas=(0.9, 0.98), weight_decay=WEIGHT_DECAY
    )
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: rate_factor(step, steps))
    started, total = time.perf_counter(), 0.0
    for step, (images, captions) in enumerate(islice(batches(rng, batch), steps), start=1):
        distinct, caption = np.unique(captions, return_inverse=True)
        image_features = model.encode_image(image_tensor(images), normalize=True)
        text_features = model.encode_text(tokenize(distinct.tolist()), normalize=True)
        logits = model.logit_scale.exp() * image_features @ text_features.T
        loss = contrastive_loss(logits, torch.from_numpy(caption))
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        with torch.no_grad():
            model.logit_scale.clamp_(max=MAX_LOGIT_SCALE)
        total += loss.item()
        if step % LOG_EVERY == 0 or step == steps:
            mean = total / (step % LOG_EVERY or LOG_EVERY)
            print(f"step {step} loss {mean:.3f} {time.perf_counter() - started:.0f} s", flush=True)
            total = 0.0
    out.parent.mkdir(parents=True, exist_ok=True)
    save_weights(model, out)


def main() -> None:
    parser = argparse.ArgumentParser(description="Pretrain the mini CLIP.")
    parser.add_argument("--out", type=Path, required=True, help="safetensors file to write")
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--batch", type=int, default=BATCH)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    if args.steps < 1 or args.batch < 2:
        parser.error(f"need --steps >= 1 and --batch >= 2, got {args.steps} and {args.batch}")
    pretrain(args.steps, args.batch, args.seed, args.out)


if __name__ == "__main__":
    main()
