"""What an answer may be: the classes among which each protocol has a model choose.

- ``task-id``: the data set is known, and so its classes and its task's expert.
- ``agnostic``: the classes of the data set are known, its expert is not.
- ``union-odcl-cil``: open-domain class-incremental learning, as CoLeCLIP (arXiv 2403.10245) and
  DPeCLIP (arXiv 2408.09984) report it. An image of a task that was learnt may be of any class
  learnt so far; a data set that was not is answered among its own classes, as in ``agnostic``
  (CoLeCLIP's code, ``Trainer.eval`` in ``engine/trainer.py``).
- ``union-x-tail``: cross-domain task-agnostic incremental learning of RAIL (arXiv 2406.18868). Any
  image may be of any class of the benchmark, learnt or not (RAIL's code, ``primal_RAIL.py``).

The classes of two tasks are never the same class, whatever their names: right is the right class
of the right task, as in RAIL's code. CoLeCLIP's counts names that occur twice once. Of MTIL's 1201
classes 49 have names that occur more than once (24 names); without CIFAR100, as X-TAIL has it, 10
have (5 names).
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, get_args

if TYPE_CHECKING:
    from condu.tasks.benchmark import Task

Protocol = Literal["task-id", "agnostic", "union-odcl-cil", "union-x-tail"]

UNIONS: tuple[Protocol, ...] = ("union-odcl-cil", "union-x-tail")
"""Protocols in which an image may be of another task's class: none for a model without classes."""


@dataclass(frozen=True)
class LabelSet:
    """The classes of ``tasks``, numbered from 0 through all of them in their order; class 0 of the
    data set that is being answered has the number ``first``."""

    tasks: tuple[Task, ...]
    first: int

    @property
    def names(self) -> tuple[str, ...]:
        """Of the tasks."""
        return tuple(task.name for task in self.tasks)

    @property
    def size(self) -> int:
        """Number of classes."""
        return _count(self.tasks)

    def block(self, name: str) -> slice:
        """The numbers of one task's classes."""
        position = self.names.index(name)
        first = _count(self.tasks[:position])
        return slice(first, first + len(self.tasks[position].classnames))


def label_set(
    protocol: Protocol, task: Task, tasks: Sequence[Task], seen: Collection[str]
) -> LabelSet:
    """Among what the data set of ``task`` is answered after the tasks named in ``seen`` were
    learnt; ``tasks`` are those of the benchmark.

    Raises ValueError for an unknown protocol, and where a union of classes would need a task that
    the benchmark lacks.
    """
    if protocol not in get_args(Protocol):
        raise ValueError(f"protocol must be one of {get_args(Protocol)}, got {protocol!r}")
    if protocol == "union-x-tail":
        union = tuple(tasks)
    elif protocol == "union-odcl-cil" and task.name in seen:
        union = tuple(other for other in tasks if other.name in seen)
    else:
        return LabelSet((task,), 0)
    known = [other.name for other in tasks]
    for name in (task.name, *seen):
        if name not in known:
            raise ValueError(f"{protocol}: task {name!r} is not one of the benchmark's {known}")
    before = union[: [other.name for other in union].index(task.name)]
    return LabelSet(union, _count(before))


def _count(tasks: Sequence[Task]) -> int:
    return sum(len(task.classnames) for task in tasks)
