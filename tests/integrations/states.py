"""How states of models and of fusions compare."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from condu_ext import UnifiedDelta


def assert_same_state(state: UnifiedDelta, expected: UnifiedDelta) -> None:
    """Equal to the bit: tasks, unified delta, masks, rescalers, private tensors."""
    assert state.tasks == expected.tasks
    assert_same_tensors(state.delta, expected.delta)
    for task in expected.tasks:
        assert_same_tensors(state.packed_mask(task), expected.packed_mask(task))
        assert_same_tensors(state.private(task), expected.private(task))
        assert state.rescaler(task) == expected.rescaler(task)


def assert_same_tensors(tensors: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert tensors.keys() == expected.keys()
    assert [name for name in expected if not torch.equal(tensors[name], expected[name])] == []


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
