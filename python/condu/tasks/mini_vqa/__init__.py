"""The embedded benchmark of visual question answering: images rendered from a seed, questions and
answers in a vocabulary of about a hundred words, and a small LLaVA to go with them."""

from __future__ import annotations

import zlib
from functools import cache, partial

import numpy as np
from PIL import Image
from torch.utils.data import Dataset

from condu.tasks.benchmark import Benchmark
from condu.tasks.mini import draw
from condu.tasks.mini_vqa.domains import DOMAINS, VqaDomain
from condu.tasks.vqa import VqaSample, VqaTask


class QuestionDataset(Dataset[VqaSample]):
    """uint8 images [N, H, W, 3], N questions and N answers, as (RGB image, question, answer)."""

    def __init__(self, images: np.ndarray, questions: list[str], answers: list[str]) -> None:
        self.images = images
        self.questions = questions
        self.answers = answers

    def __len__(self) -> int:
        return len(self.answers)

    def __getitem__(self, index: int) -> VqaSample:
        return Image.fromarray(self.images[index]), self.questions[index], self.answers[index]


@cache
def _render(domain: VqaDomain, seed: int, split: str) -> QuestionDataset:
    # a random stream of its own for each task and split
    rng = np.random.default_rng([seed, zlib.crc32(f"vqa/{domain.name}/{split}".encode())])
    per_answer = domain.train if split == "train" else domain.test
    answers = np.repeat(np.arange(len(domain.answers)), per_answer)
    canvas, subjects = domain.scene(rng, answers)
    return QuestionDataset(
        draw.finish(rng, canvas, noise=0.06),
        domain.questions(rng, subjects),
        [domain.answers[i] for i in answers],
    )


def mini_vqa_benchmark(seed: int = 0) -> Benchmark:
    """Five tasks of 9 to 12 answers, about 1000 training and 250 test questions each.

    ``seed`` decides every rendered pixel and every question. Images are kept in memory once
    rendered.
    """
    tasks = tuple(VqaTask(domain.name, partial(_render, domain, seed)) for domain in DOMAINS)
    return Benchmark("mini_vqa", tasks)
