"""What the trainer asks of a model: examples to train on, a loss, and a way to score it.

A `LiveModel` is a module and all that goes with it. Everything here works on whatever weights the
module holds at the moment; methods put weights in and take them out.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any, ClassVar
from typing import Protocol as Interface

from torch import Tensor, nn
from torch.utils.data import Dataset

if TYPE_CHECKING:
    from typing_extensions import Self

    from condu.evaluation import Row
    from condu.labels import Protocol
    from condu.tasks.benchmark import Benchmark

Autocast = Callable[[], AbstractContextManager[Any]]
"""Makes the context of forward passes in mixed precision."""

Objective = Callable[[nn.Module, Any], Tensor]
"""The mean loss of a batch under a module that may be wrapped (DistributedDataParallel, PEFT)."""


class Scorer(Interface):
    """Measures a live model on the test sets of a benchmark, in percent."""

    def accuracy(self, task: Any) -> float:
        """Accuracy of the live weights on a task's test set."""
        ...

    def rows(self, seen: int, protocols: Sequence[Protocol]) -> dict[Protocol, Row]:
        """The row of each protocol, after the first `seen` tasks of the benchmark, where the live
        weights answer everything; of a model that does not vote, of those without unions."""
        ...

    def over(self, live: Any) -> Self:
        """The same over another live model, sharing test sets that were read already. The other
        model must compute what this one does at θ_0, as one with fresh adapters does."""
        ...


class LiveModel(Interface):
    """`frozen`: patterns (fnmatch) of names of parameters that fine-tuning leaves alone.
    `lora_targets`: names of the modules that get adapters. `votes`: whether experts can be chosen
    by semantic voting, which compares features of images with prototypes: its scorer is then a
    `condu.evaluation.Evaluator`. `collate`: examples to a batch; None for torch's own.
    """

    frozen: ClassVar[tuple[str, ...]]
    votes: ClassVar[bool]
    task_type: ClassVar[type]

    @property
    def lora_targets(self) -> tuple[str, ...]: ...
    @property
    def name(self) -> str: ...
    @property
    def model(self) -> nn.Module: ...
    @property
    def collate(self) -> Callable[[list[Any]], Any] | None: ...

    def training_set(self, task: Any) -> Dataset[Any]:
        """Map-style examples of a task, through the transform for training."""
        ...

    def objective(self, task: Any, label_smoothing: float) -> Objective:
        """The loss of a task."""
        ...

    def evaluator(
        self, benchmark: Benchmark, *, batch_size: int, autocast: Autocast = nullcontext
    ) -> Scorer:
        """A scorer of this model, which answers in the context that `autocast` makes."""
        ...

    def with_model(self, model: nn.Module) -> Self:
        """The same around another module of the same kind."""
        ...
