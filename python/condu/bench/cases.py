"""What is measured: operation, model, tasks, precision; and how many bytes each has to move.

The floors count every input read once and every output written once, masks at one bit an element
and task, also where an operation reads its inputs twice. They are what the achieved rate (floor ÷
time) is computed from.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import torch

from condu.bench.shapes import MODELS, Shapes, largest, parameters


@dataclass(frozen=True)
class Precision:
    """Dtypes of the models and of the unified delta."""

    models: torch.dtype
    state: torch.dtype

    @property
    def model_bytes(self) -> int:
        return self.models.itemsize

    @property
    def state_bytes(self) -> int:
        return self.state.itemsize


PRECISIONS = {
    "fp32": Precision(torch.float32, torch.float32),
    "bf16": Precision(torch.bfloat16, torch.float32),
    "bf16/bf16": Precision(torch.bfloat16, torch.bfloat16),
    "fp16": Precision(torch.float16, torch.float32),
}
"""Models' dtype, and after a slash the state's where that is not float32."""

OPERATIONS = {
    "absorb": "one more model into a state of T tasks, which makes a new state",
    "absorb_": "the same in place, without reading the inputs first to check them (check=False)",
    "absorb_+check": "the same in place as it is called by default",
    "decouple_": "one expert of a state of T tasks, into a live model",
    "merge": "two states that hold T tasks together",
    "unify": "T fine-tuned models at once",
}


@dataclass(frozen=True)
class Case:
    """One operation on one model.

    Attributes:
        operation: a key of :data:`OPERATIONS`.
        model: a key of :data:`condu.bench.shapes.MODELS`.
        tasks: T: models that are unified; for the other operations tasks that the incoming state
            (or both states of a merge together) holds.
        precision: a key of :data:`PRECISIONS`.

    Raises:
        ValueError: an unknown name, or too few tasks for the operation.
    """

    operation: str
    model: str
    tasks: int
    precision: str = field(default="fp32")

    def __post_init__(self) -> None:
        for what, value, known in (
            ("operation", self.operation, OPERATIONS),
            ("model", self.model, MODELS),
            ("dtype", self.precision, PRECISIONS),
        ):
            if value not in known:
                raise ValueError(f"unknown {what} {value!r}; there are {', '.join(known)}")
        least = 2 if self.operation == "merge" else 1
        if self.tasks < least:
            raise ValueError(f"{self.operation} needs at least {least} tasks, not {self.tasks}")

    def __str__(self) -> str:
        return f"{self.operation} {self.model} {self.precision} T={self.tasks}"

    @cached_property
    def shapes(self) -> Shapes:
        return MODELS[self.model]()

    @cached_property
    def parameters(self) -> int:
        return parameters(self.shapes)

    @cached_property
    def largest(self) -> int:
        return largest(self.shapes)

    @property
    def dtypes(self) -> Precision:
        return PRECISIONS[self.precision]

    @property
    def floor_bytes(self) -> int:
        """Bytes that have to move."""
        n, tasks = self.parameters, self.tasks
        theta, u = self.dtypes.model_bytes, self.dtypes.state_bytes
        values = {
            "unify": (tasks + 1) * theta + u,
            "absorb": 2 * theta + 2 * u,
            "absorb_": 2 * theta + 2 * u,
            "absorb_+check": 2 * theta + 2 * u,
            "decouple_": 2 * theta + u,
            "merge": 3 * u,
        }
        bits = {"unify": tasks, "decouple_": 1, "merge": 2 * tasks}
        return n * values[self.operation] + n * bits.get(self.operation, 2 * tasks + 1) // 8

    @property
    def result_bytes(self) -> int:
        """Memory that an operation adds to its inputs: the new state, or one bit a parameter."""
        n, tasks, u = self.parameters, self.tasks, self.dtypes.state_bytes
        values = {"unify": u, "merge": u, "absorb": u}
        bits = {"unify": tasks, "merge": tasks, "absorb": tasks + 1, "decouple_": 0}
        return n * values.get(self.operation, 0) + n * bits.get(self.operation, 1) // 8

    @property
    def resident_bytes(self) -> int:
        """Memory that our side needs at its highest: inputs, outputs, and what restores them."""
        n, tasks = self.parameters, self.tasks
        theta, u = self.dtypes.model_bytes, self.dtypes.state_bytes
        states = {
            "unify": (1, tasks),
            "absorb": (2, 2 * tasks + 1),
            "absorb_": (2, 2 * tasks + 1),
            "absorb_+check": (2, 2 * tasks + 1),
            "decouple_": (1, tasks),
            "merge": (3, 2 * tasks),
        }
        deltas, bits = states[self.operation]
        models = tasks + 1 if self.operation == "unify" else 2
        return n * (models * theta + deltas * u) + n * bits // 8


def cases_of(
    operations: Sequence[str],
    models: Sequence[str],
    tasks: Sequence[int],
    precisions: Sequence[str],
) -> list[Case]:
    """Every combination, in the order that lets neighbours share their inputs.

    Raises:
        ValueError: an unknown name, nothing to measure, or too few tasks.
    """
    unique = [list(dict.fromkeys(values)) for values in (models, precisions, operations)]
    cases = [
        Case(operation, model, count, precision)
        for model in unique[0]
        for precision in unique[1]
        for operations_ in _sharing(unique[2])
        for count in sorted(set(tasks))
        for operation in operations_
    ]
    if not cases:
        raise ValueError("there is nothing to measure: name an operation, model, dtype and tasks")
    return cases


def _sharing(operations: Iterable[str]) -> list[list[str]]:
    """Operations in groups that need the same inputs: one state, two states, T models."""
    chosen = list(operations)
    alone = [name for name in chosen if name in ("merge", "unify")]
    return [[name for name in chosen if name not in alone], *([name] for name in alone)]
