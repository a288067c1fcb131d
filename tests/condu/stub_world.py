"""A CLIP whose images are vectors and whose prompts are single tokens, and a benchmark of such."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from condu.evaluation import Evaluator
from condu.fusion import ConDU
from condu.prototypes import PrototypeSet
from condu.tasks.benchmark import Benchmark, Task

DIM = 6
WORDS = [f"{template}{word}" for word in "abcdefghi" for template in ("x", "y", "z")]


class StubClip(nn.Module):
    """open_clip's interface; an image is a vector [DIM], a prompt one token."""

    def __init__(self) -> None:
        super().__init__()
        self.visual = nn.Sequential(nn.Linear(DIM, 8), nn.Dropout(0.5), nn.Linear(8, DIM))
        self.text = nn.Embedding(len(WORDS), DIM)
        self.logit_scale = nn.Parameter(torch.tensor(2.0))

    def encode_image(self, images: Tensor, normalize: bool = False) -> Tensor:
        return self.visual(images)

    def encode_text(self, tokens: Tensor, normalize: bool = False) -> Tensor:
        return self.text(tokens[:, 0])


@dataclass
class Clip:
    model: Any
    tokenize: Callable[[Sequence[str]], Tensor]
    test_transform: Callable[[Any], Any]


def tokenize(prompts: Sequence[str]) -> Tensor:
    return torch.tensor([[WORDS.index(prompt)] for prompt in prompts])


def identity(image: Any) -> Any:
    return image


def make_task(name: str, classes: str, test_size: int, seed: int) -> Task:
    generator = torch.Generator().manual_seed(seed)
    centre = 3 * torch.randn(len(classes), DIM, generator=generator)

    def load(split: str) -> Any:
        size = test_size if split == "test" else 40
        draw = torch.Generator().manual_seed(seed + len(split))
        return [
            (centre[i % len(classes)] + torch.randn(DIM, generator=draw), i % len(classes))
            for i in range(size)
        ]

    return Task(name, tuple(classes), ("x{}", "y{}", "z{}"), load)


def items(task: Task, split: str = "test") -> list[Any]:
    """(image, label) pairs of a task of ``make_task``."""
    loaded: Any = task.load(split)
    return loaded


@dataclass
class World:
    clip: Any
    benchmark: Benchmark
    fusion: ConDU
    prototypes: PrototypeSet
    evaluator: Evaluator
    seen: list[tuple[str | None, str, Tensor]]
    """(active expert, tower, its inputs) of every forward call"""

    def forwards(self, tower: str) -> Iterator[tuple[str | None, Tensor]]:
        return ((active, inputs) for active, which, inputs in self.seen if which == tower)

    def images_by_expert(self, task: Task) -> dict[str | None, list[int]]:
        """Which test images of the task went through the vision tower under which expert."""
        index = {tuple(image.tolist()): i for i, (image, _) in enumerate(items(task))}
        shown: dict[str | None, list[int]] = {}
        for active, inputs in self.forwards("visual"):
            for image in inputs.tolist():
                if tuple(image) in index:
                    shown.setdefault(active, []).append(index[tuple(image)])
        return {active: sorted(images) for active, images in shown.items()}


def make_world(
    learned: int = 3,
    classes: Sequence[str] = ("abc", "defg", "hi", "cfh"),
    **options: Any,
) -> World:
    """A benchmark of four tasks with these classes, a letter each, of which the first ``learned``
    were learnt: by moving the weights somewhere."""
    torch.manual_seed(0)
    model = StubClip()
    clip: Any = Clip(model, tokenize, identity)
    names, sizes = ("one", "two", "three", "unseen"), (23, 17, 11, 13)
    tasks = tuple(
        make_task(name, letters, size, seed)
        for seed, (name, letters, size) in enumerate(zip(names, classes, sizes, strict=True), 1)
    )
    benchmark = Benchmark("stub", tasks)
    fusion = ConDU(model)
    prototypes = PrototypeSet()
    evaluator = Evaluator(clip, benchmark, **{"batch_size": 4, **options})
    for task in tasks[:learned]:
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if name != "logit_scale":
                    parameter += 0.3 * torch.randn_like(parameter)
        fusion.absorb(task.name)
        evaluator.add_prototypes(prototypes, task, fusion)
    world = World(clip, benchmark, fusion, prototypes, evaluator, [])

    def watch(tower: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        def hook(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            assert not model.training
            assert not torch.is_grad_enabled()
            world.seen.append((fusion.active, tower, inputs[0].clone()))

        return hook

    model.visual.register_forward_pre_hook(watch("visual"))
    model.text.register_forward_pre_hook(watch("text"))
    return world


def labels_of(task: Task) -> Tensor:
    return torch.tensor([label for _, label in items(task)])
