"""How states, and what is left of models, compare."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from condu_ext import UnifiedDelta


def contents(state: UnifiedDelta) -> dict[str, Any]:
    """All that a state says, in what ``torch.save`` takes."""
    return {
        "tasks": list(state.tasks),
        "rescalers": {task: state.rescaler(task) for task in state.tasks},
        "unified": state.delta,
        **{f"mask {task}": state.packed_mask(task) for task in state.tasks},
        **{f"private {task}": state.private(task) for task in state.tasks},
    }


def assert_same(found: dict[str, Any], expected: dict[str, Any]) -> None:
    """Contents of two states, or two state dicts, are equal to the bit."""
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        if isinstance(value, Tensor):
            assert torch.equal(found[name], value), name
        elif isinstance(value, dict):
            assert_same(found[name], value)
        else:
            assert found[name] == value, name


def snapshot(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in model.state_dict().items()}


def make_up(model: nn.Module) -> list[object]:
    """What a well-behaved guest leaves as it was: classes, attributes, hooks."""
    return [
        (
            type(module),
            list(vars(module)),
            [len(hooks) for name, hooks in vars(module).items() if name.endswith("hooks")],
        )
        for module in model.modules()
    ]
