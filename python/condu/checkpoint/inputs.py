"""Ranges of the models that are fused: those of the base and of every fine-tuned checkpoint."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from condu.checkpoint.fingerprints import source_fingerprint
from condu.checkpoint.matching import Matched
from condu.checkpoint.room import Room
from condu.checkpoint.sources import Source
from condu.checkpoint.units import Unit
from condu_ext.layout import ModelSpec


@dataclass(frozen=True)
class ModelRanges:
    """A unit's parts of the base and the models: arguments of :mod:`condu_ext.ranges`.

    Attributes:
        models: per task the segments, flat.
        base: the segments of θ_0; None where the models were made deltas already.
        via: per segment the dtype through which θ_0 is rounded.
        theta_0: the segments of θ_0 as stored, for its fingerprint.
    """

    models: list[list[Tensor]]
    base: list[Tensor] | None
    via: list[torch.dtype | None]
    theta_0: list[Tensor]


class Models:
    """A base checkpoint and fine-tuned ones that were matched against it.

    Adapters bring deltas. Beside one, all models are made deltas here, by the one fp32 subtraction
    that the kernels do.
    """

    def __init__(
        self, spec: ModelSpec, base: Source, base_names: Sequence[str], tasks: Sequence[Matched]
    ) -> None:
        self._spec, self._base, self._base_names, self._tasks = spec, base, base_names, tasks
        self._deltas = any(task.source.is_delta for task in tasks)

    @property
    def reads(self) -> int:
        """Bytes of all the fused tensors."""
        return sum(
            source.tensors[name].nbytes
            for source, names in self._sources()
            for name in names
            if name is not None
        )

    @property
    def element_bytes(self) -> float:
        """Memory for an element of all of them."""
        stored = sum(
            max(source.tensors[name].dtype.itemsize for name in names if name is not None)
            for source, names in self._sources()
        )
        return stored + 4 * (len(self._tasks) + 3) * self._deltas

    def read(self, unit: Unit, room: Room) -> ModelRanges:
        """A unit's parts of all of them.

        Raises:
            OSError: a file cannot be read.
        """
        theta_0 = [
            self._part(self._base, self._base_names[s.tensor], s.start, s.stop, room)
            for s in unit.segments
        ]
        via = [self._spec.tensors[s.tensor].via for s in unit.segments]
        models: list[list[Tensor]] = []
        for task in self._tasks:
            parts = []
            for segment, start, through in zip(unit.segments, theta_0, via, strict=True):
                name = task.names[segment.tensor]
                if name is not None:
                    part = self._part(task.source, name, segment.start, segment.stop, room)
                    if self._deltas and not task.source.is_delta:
                        part = _delta(part, start, through, room)
                elif self._deltas:
                    part = room.take(segment.numel, torch.float32).zero_()
                else:
                    part = start.to(through) if through else start
                parts.append(part)
            models.append(parts)
        return ModelRanges(models, None if self._deltas else theta_0, via, theta_0)

    def fingerprint(self, tensor: int) -> str:
        """xxh3 of the base's tensor, read anew."""
        return source_fingerprint(self._base, self._base_names[tensor])

    def _sources(self) -> list[tuple[Source, Sequence[str | None]]]:
        return [(self._base, self._base_names), *((t.source, t.names) for t in self._tasks)]

    def _part(self, source: Source, name: str, start: int, stop: int, room: Room) -> Tensor:
        out = room.take(stop - start, source.tensors[name].dtype)
        source.read(name, start, stop, out)
        return out


def _delta(theta: Tensor, theta_0: Tensor, via: torch.dtype | None, room: Room) -> Tensor:
    start = theta_0.to(via) if via else theta_0
    out = room.take(theta.numel(), torch.float32)
    return torch.sub(theta.float(), start.float(), out=out)
