"""What a continual-learning method is to the trainer."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, TypeVar

from condu.config import ConfigError
from condu.labels import UNIONS, Protocol
from condu.models.clip import ClipModel
from condu.record import Learned

if TYPE_CHECKING:
    from condu.evaluation import Row
    from condu.reconstruction import Fused
    from condu.tuning import Tuner
    from condu.workspace import Tuning, Workspace


class Method(ABC):
    """One line of the table. For task 0, 1, … the trainer calls `learn(index)`, `rows(index)` and
    `fused(index)`.

    The live model of `tuner` holds θ_0 before and after each of these calls. What a method needs
    later it keeps on disk under `folder`, and `learn` finds it there if it had finished before the
    process was killed: learning the same task again changes nothing. `learn` runs in every process
    of a distributed run, the others only in the main one.
    """

    name: ClassVar[str]
    tuning: ClassVar[Tuning] = "full"
    protocols: tuple[Protocol, ...] = ("task-id", "agnostic", *UNIONS)
    """Those it can be evaluated with; an instance may have fewer than its class."""

    def __init__(self, workspace: Workspace) -> None:
        """Raises `ConfigError` if the run's protocols ask for a union of classes and its model
        knows of no classes."""
        self.workspace = workspace
        if not workspace.live.votes:
            self.protocols = tuple(p for p in self.protocols if p not in UNIONS)
            for protocol in workspace.config.protocols:
                if protocol in UNIONS:
                    raise ConfigError(
                        f"protocols: {protocol!r} is a choice among the classes of several tasks, "
                        f"for which it takes a CLIP model; model.name is {workspace.live.name!r}"
                    )

    @property
    def tuner(self) -> Tuner:
        """What fine-tunes for this method."""
        return self.workspace.tuner(self.tuning)

    @property
    def folder(self) -> Path:
        """The method's own part of the run folder."""
        return self.workspace.folder / self.name

    @abstractmethod
    def learn(self, index: int) -> Learned:
        """Learn task `index`; those before it have been learnt, perhaps before a restart."""

    @abstractmethod
    def rows(self, index: int, protocols: Sequence[Protocol]) -> dict[Protocol, Row]:
        """Accuracy on every dataset of the benchmark after task `index`, by protocol."""

    def fused(self, index: int) -> Fused | None:
        """Of a method with a unified model: what has become of tasks 0 … `index` in it."""
        return None


def clip_model_of(method: Method) -> ClipModel:
    """The live model of a method that works on CLIP models alone. Raises `ConfigError` for another
    kind, so it is to be called when the method is made."""
    live = method.workspace.live
    if not isinstance(live, ClipModel):
        raise ConfigError(
            f"methods: {method.name!r} compares images with texts, for which it takes a CLIP model;"
            f" model.name is {live.name!r}"
        )
    return live


METHODS: dict[str, type[Method]] = {}
M = TypeVar("M", bound=type[Method])


def register(method: M) -> M:
    """Class decorator that makes a method known by its `name`."""
    if method.name in METHODS:
        raise ValueError(f"method {method.name!r} is registered twice")
    METHODS[method.name] = method
    return method
