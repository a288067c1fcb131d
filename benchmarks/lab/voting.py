"""Would a kernel for the semantic vote pay? Times every step of it against one encoder forward.

    OMP_NUM_THREADS=1 python benchmarks/lab/voting.py

The setting is MTIL's: 1201 prototypes of 11 tasks in 512 dimensions, a batch of 256 images, the
four most similar experts. The encoder, ViT-B/16, is not run: its time is its arithmetic
(35 GFLOP an image) at the rate that a matrix product of its own shape reaches here. See voting.md.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F

from condu import PrototypeSet, SemanticVoting
from condu.voting import task_similarities

CLASSES = (100, 101, 100, 47, 10, 102, 101, 10, 37, 196, 397)  # MTIL, Order I
IMAGES, DIM = 256, 512
GFLOP_PER_IMAGE = 35.0
TOKENS, WIDTH = 197, 768  # of ViT-B/16


def milliseconds(work: Callable[[], object], runs: int) -> float:
    """Median time, after one run that is not counted."""
    work()
    times = []
    for _ in range(runs):
        start = time.perf_counter()
        work()
        times.append(time.perf_counter() - start)
    return 1e3 * statistics.median(times)


def prototypes() -> PrototypeSet:
    found = PrototypeSet()
    for task, classes in enumerate(CLASSES):
        text = F.normalize(torch.randn(classes, DIM), dim=1)
        found.add(f"task {task}", torch.randn(classes, DIM), torch.arange(classes), text)
    return found


def encoder_gflops(runs: int) -> float:
    """GFLOP/s of the first linear layer of a block's MLP, 16 images at a time."""
    tokens, weight = torch.randn(16 * TOKENS, WIDTH), torch.randn(WIDTH, 4 * WIDTH)
    flop = 2 * tokens.shape[0] * weight.shape[0] * weight.shape[1]
    return flop / 1e6 / milliseconds(lambda: tokens @ weight, runs)


def best_of_tasks(cosine: torch.Tensor) -> torch.Tensor:
    return torch.stack([part.amax(1) for part in cosine.split(CLASSES, dim=1)], 1)


def main(runs: int = 15) -> None:
    torch.manual_seed(0)
    voting, known = SemanticVoting(), prototypes()
    features = torch.randn(IMAGES, DIM)
    bank, _ = known.features()
    similarity = task_similarities(features, known)
    votes = voting.vote(features, known)
    logits = 100 * F.normalize(torch.randn(IMAGES, voting.k, sum(CLASSES)), dim=2)

    gflops = encoder_gflops(runs)
    encoder = 1e3 * IMAGES * GFLOP_PER_IMAGE / gflops
    cosine = F.normalize(features, dim=1) @ bank.T
    steps: dict[str, Callable[[], object]] = {
        "prototypes put together": known.features,
        "features · prototypes (GEMM)": lambda: features @ bank.T,
        "best prototype of each task": lambda: best_of_tasks(cosine),
        "stable sort of the tasks": lambda: similarity.sort(dim=1, descending=True, stable=True),
        "vote, whole": lambda: voting.vote(features, known),
        "fuse 4 experts, 1201 classes": lambda: voting.fuse(logits, votes.weights),
    }
    took = {name: milliseconds(step, runs) for name, step in steps.items()}
    took["vote and fuse without the GEMM"] = (
        took["vote, whole"]
        - took["features · prototypes (GEMM)"]
        + took["fuse 4 experts, 1201 classes"]
    )
    print(f"{IMAGES} images, {torch.get_num_threads()} thread(s), torch {torch.__version__}")
    print(f"one encoder forward: {encoder / 1e3:.1f} s at {gflops:.0f} GFLOP/s")
    for name, time_of in took.items():
        print(f"{name:32s} {time_of:8.3f} ms {time_of / encoder:9.1e} of a forward")


if __name__ == "__main__":
    main()
