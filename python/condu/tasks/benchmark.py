"""Tasks and benchmarks: what every source of data, rendered or downloaded, has to offer."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from string import Formatter
from typing import Any, Literal

from PIL.Image import Image
from torch import Tensor
from torch.utils.data import Dataset

from condu.tasks.reference import ReferenceSet

Split = Literal["train", "test"]


class TransformedDataset(Dataset[tuple[Tensor, int]]):
    """A map-style view of ``source`` whose images went through ``transform``."""

    def __init__(self, source: Any, transform: Callable[[Image], Tensor]) -> None:
        self.source = source
        self.transform = transform

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        image, label = self.source[index]
        return self.transform(image), label


@dataclass(frozen=True)
class Task:
    """One classification task.

    classnames: one per label, in label order.
    templates: prompts with one ``{}`` each; training uses the first, zero-shot heads all of them.
    load: ``load("train" | "test")`` returns a map-style data set of (RGB image, int label), the
        same one each time.
    """

    name: str
    classnames: tuple[str, ...]
    templates: tuple[str, ...]
    load: Callable[[str], Dataset[tuple[Image, int]]]

    def __post_init__(self) -> None:
        if len(set(self.classnames)) != len(self.classnames) or not self.classnames:
            raise ValueError(
                f"task {self.name!r}: class names must be unique and not empty, got "
                f"{self.classnames}"
            )
        if not self.templates:
            raise ValueError(f"task {self.name!r}: at least one template is needed, got none")
        for template in self.templates:
            if _fields(template) != [""]:
                raise ValueError(
                    f"task {self.name!r}: template {template!r} needs exactly one '{{}}' and no "
                    "other brace"
                )

    @property
    def prompts(self) -> list[str]:
        """What training calls the classes: each in the first template."""
        return [self.templates[0].format(name) for name in self.classnames]

    def dataset(self, split: Split, transform: Callable[[Image], Tensor]) -> TransformedDataset:
        """Data set of (float32 tensor [3, H, W], int label); ValueError for an unknown split."""
        if split not in ("train", "test"):
            raise ValueError(f"task {self.name!r}: split must be 'train' or 'test', got {split!r}")
        return TransformedDataset(self.load(split), transform)


def _fields(template: str) -> list[str]:
    """What stands in the braces of a template; none of one whose braces do not match."""
    try:
        return [field for _, field, _, _ in Formatter().parse(template) if field is not None]
    except ValueError:
        return []


@dataclass(frozen=True)
class Benchmark:
    """Tasks in training order, all of one kind (`Task`, `VqaTask`), with unique names.

    reference: images and captions of other things, if the benchmark comes with any.
    workers: processes that are to prepare batches; 0 where examples are in memory or cheap.
    """

    name: str
    tasks: tuple[Any, ...]
    reference: Callable[[], ReferenceSet] | None = None
    workers: int = 0

    def __post_init__(self) -> None:
        names = [task.name for task in self.tasks]
        if len(set(names)) != len(names):
            raise ValueError(f"benchmark {self.name!r}: task names must be unique, got {names}")

    def __len__(self) -> int:
        return len(self.tasks)

    def __iter__(self) -> Iterator[Any]:
        return iter(self.tasks)

    def __getitem__(self, name: str) -> Any:
        for task in self.tasks:
            if task.name == name:
                return task
        raise KeyError(
            f"benchmark {self.name!r} has no task {name!r}, only {[t.name for t in self.tasks]}"
        )

    def subset(self, n: int) -> Benchmark:
        """The first ``n`` tasks; ValueError unless 1 <= n <= len(self)."""
        if not 1 <= n <= len(self):
            raise ValueError(f"benchmark {self.name!r} has {len(self)} tasks, cannot take {n}")
        return replace(self, tasks=self.tasks[:n])

    def order(self, names: Sequence[str]) -> Benchmark:
        """The tasks of these names, some or all, in their order; ValueError for a name that is
        listed twice, KeyError for one that there is not."""
        return replace(self, tasks=tuple(self[name] for name in names))
