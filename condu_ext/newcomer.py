"""Models that are about to join: checked against a state, and between processes."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from torch import Tensor

from condu_ext._dispatch import Sources, read_base
from condu_ext.inputs import (
    Model,
    check_devices,
    check_fixed,
    check_private,
    is_private,
    private_tensors,
    resolve,
)
from condu_ext.layout import Arena, ModelSpec
from condu_ext.rounding import with_rounding
from condu_ext.sharding import is_sharded
from condu_ext.unified import UnifiedDelta

Inputs = tuple[list[Tensor], list[Tensor], list[int]]  # model, base and via of an operator


def claims_of_task(
    spec: ModelSpec, who: str, model: Model, tensors: list[Tensor | None]
) -> dict[str, object]:
    """What processes that share a model must agree on: which tensors a task brings. Nothing where
    no process shares it."""
    if spec.mesh is None:
        return {}
    absent = [e.name for e, t in zip(spec.tensors, tensors, strict=True) if t is None]
    private = {name: tensor for name, tensor in model.items() if is_private(name, spec.private)}
    return {f"the missing tensors of {who}": absent} | claims_of_private(who, private)


def claims_of_private(who: str, private: Model) -> dict[str, object]:
    """What they must agree on for tensors of a task that are stored whole."""
    return {
        f"the private tensors of {who}": [
            (name, tuple(t.shape), t.dtype, t.placements if is_sharded(t) else "plain")
            for name, t in sorted(private.items())
        ]
    }


def claims_of_call(
    spec: ModelSpec, pretrained: Model | None, indices: Iterable[Sequence[int]]
) -> dict[str, object]:
    """What they must agree on for all tasks; ``indices`` are those of the arenas."""
    if spec.mesh is None:
        return {}
    return spec.claims() | {
        "whether there is a pretrained model": pretrained is not None,
        "which tensors share a device": [list(index) for index in indices],
    }


class Newcomer:
    """A model that is about to be absorbed, checked against a state."""

    def __init__(
        self,
        state: UnifiedDelta,
        task: str,
        finetuned: Model,
        pretrained: Model | None,
        missing: str,
        match_dtype: bool,
    ) -> None:
        state.check_new_task(task)
        who = f"task {task!r}"
        base = read_base(state.spec, pretrained)
        tensors = resolve(state.spec, who, finetuned, missing)
        check_private(state.spec, who, finetuned, missing)
        check_fixed(state.spec, who, finetuned, pretrained)
        devices = state.devices()
        check_devices(state.spec, who, tensors, devices)
        check_devices(state.spec, "pretrained", base, devices)
        self.spec = with_rounding(
            state.spec, who, tensors, base, match_dtype=match_dtype, settled=bool(state.tasks)
        )
        self.model = Sources(self.spec, tensors)
        self.base = Sources(self.spec, base) if pretrained is not None else None
        self.private = private_tensors(state.spec, finetuned)
        indices = [arena.index for arena in state.arenas]
        self.claims = {
            "the tasks": [*state.tasks, task],
            **claims_of_task(self.spec, who, finetuned, tensors),
            **claims_of_call(self.spec, pretrained, indices),
        }

    def inputs(self, arena: Arena) -> Inputs:
        """Arguments ``model``, ``base`` and ``via`` of the operators for one arena."""
        device = arena.device
        base = self.base.flat(arena.index, None, device) if self.base else []
        return self.model.flat(arena.index, self.base, device), base, self.model.via(arena.index)
