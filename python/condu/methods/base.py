"""What a continual-learning method is to the trainer."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, TypeVar

if TYPE_CHECKING:
    from condu.evaluation import Protocol
    from condu.workspace import Workspace


@dataclass(frozen=True)
class Seconds:
    """Wall-clock seconds of learning one task: fine-tuning, fusing it into the unified model, and
    work on behalf of evaluation such as prototypes."""

    train: float = 0.0
    fuse: float = 0.0
    evaluate: float = 0.0


class Method(ABC):
    """One line of the table. For task 0, 1, … the trainer calls `learn(index)`, then `rows(index)`.

    The live model `workspace.clip.model` holds θ_0 before and after each of these calls. What a
    method needs later it keeps on disk under `workspace.folder`, and `learn` finds it there if it
    had finished before the process was killed: learning the same task again changes nothing.
    `learn` runs in every process of a distributed run, `rows` only in the main one.
    """

    name: ClassVar[str]
    protocols: ClassVar[tuple[Protocol, ...]] = ("task-id", "agnostic")

    def __init__(self, workspace: Workspace) -> None:
        self.workspace = workspace

    @abstractmethod
    def learn(self, index: int) -> Seconds:
        """Learn task `index`; those before it have been learnt, perhaps before a restart."""

    @abstractmethod
    def rows(self, index: int, protocols: Sequence[Protocol]) -> dict[Protocol, list[float]]:
        """Accuracy (percent) on every dataset of the benchmark after task `index`, by protocol."""


METHODS: dict[str, type[Method]] = {}
M = TypeVar("M", bound=type[Method])


def register(method: M) -> M:
    """Class decorator that makes a method known by its `name`."""
    if method.name in METHODS:
        raise ValueError(f"method {method.name!r} is registered twice")
    METHODS[method.name] = method
    return method
