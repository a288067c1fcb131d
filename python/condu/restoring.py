"""Checkpoints of a live model's state: read into its space, and tied to its pretrained weights."""

from __future__ import annotations

import os
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor, nn

from condu.live import changeable, matches
from condu.spaces import WeightSpace, holds_factors, space_of
from condu_ext import UnifiedDelta
from condu_ext.collective import Step
from condu_ext.manifest import read_manifest
from condu_ext.sharding import mesh_of

_FROZEN_WEIGHTS = "(frozen weights)"
"""Key in ``UnifiedDelta.base_fingerprints`` of what a state over adapters does not hold itself."""


@dataclass(frozen=True)
class Checkpoint:
    """A state that was read for a live model.

    named: every live tensor, by its name in the state. names: those that belong to the state.
    """

    where: str
    state: UnifiedDelta
    space: WeightSpace
    named: Mapping[str, Tensor]
    names: set[str]

    @classmethod
    def read(cls, path: str | os.PathLike[str], model: nn.Module) -> Checkpoint:
        """Read a state, placed as the model's tensors are if these are sharded.

        Raises:
            KeyError: the model lacks a tensor of the state.
            ValueError: the state is one of another space, or of other adapters than the model's.
        """
        where = os.fspath(path)
        mesh = mesh_of(model.state_dict())
        with Step(mesh):
            fused = read_manifest(Path(path)).spec.names
            space = space_of(model, "factors" if holds_factors(fused) else "product")
            named = space.named()
        state = UnifiedDelta.load(path, like=named if mesh is not None else None)
        with Step(mesh):
            try:
                space.match(state, named)
            except ValueError as error:
                raise ValueError(f"{where}: {error}") from None
            # a state without tasks knows its private tensors by pattern only
            names = {n for n in changeable(named) if matches(n, state.spec.private)}.union(
                state.spec.names, *(state.private(task) for task in state.tasks)
            )
            for name in sorted(names):
                if name not in named:
                    raise KeyError(f"{where}: the model has no tensor {name!r}")
        return cls(where, state, space, named, names)

    def verify_base(self, pretrained: Mapping[str, Tensor], restored: Mapping[str, Tensor]) -> None:
        """Check that the model is the one that the state was made over; warns when a state of saved
        adapters cannot know.

        Args:
            pretrained: θ_0 of what is in the state.
            restored: θ_0 of what is put back beside it too.

        Raises:
            ValueError: naming the first tensor that differs, or the weights under the adapter.
        """
        known = self.state.base_fingerprints
        if not known and not self.space.needs_base:
            warnings.warn(
                f"{self.where}: the state has no fingerprint of its base model, so nothing can tell"
                " whether this is the model that its adapters were trained on",
                stacklevel=3,
            )
            return
        self.state.verify_base(pretrained)
        frozen = known.get(_FROZEN_WEIGHTS)
        if frozen and self.space.frozen_fingerprint(restored) not in (None, frozen):
            raise ValueError(
                f"{self.where}: the weights under the adapter, or its scale, differ from those that"
                " the state was made over"
            )


def record_base(
    state: UnifiedDelta,
    space: WeightSpace,
    pretrained: Mapping[str, Tensor],
    restored: Mapping[str, Tensor],
) -> None:
    """Note the fingerprints in a state that :meth:`Checkpoint.verify_base` checks, where it has
    none; see there for the arguments.
    """
    if not state.base_fingerprints:
        state.record_base(pretrained)
    known = state.base_fingerprints
    if _FROZEN_WEIGHTS not in known and (frozen := space.frozen_fingerprint(restored)):
        known[_FROZEN_WEIGHTS] = frozen
