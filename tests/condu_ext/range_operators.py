"""The operators, put together from :mod:`condu_ext.ranges`: a model cut at chunk borders into
pieces that are fused in any order, in any company, in memory that held something else before.

:class:`InRanges` stands in for a module of operators, so whatever is tested of one can be tested of
pieces.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from random import Random
from typing import Any

import torch
from torch import Tensor

from condu_ext import _ops, ranges
from condu_ext.layout import CHUNK, chunk_count, offsets
from condu_ext.ranges import StateRange
from condu_ext.reference import VIA_DTYPES
from condu_ext.rule import FusionRule

RULES = [FusionRule(zero_sum=kind) for kind in ("negative", "positive", "zero")]
GARBAGE = 0xA5


@dataclass(frozen=True)
class Piece:
    """Elements [start, stop) of a tensor."""

    tensor: int
    start: int
    stop: int

    @property
    def numel(self) -> int:
        return self.stop - self.start

    def of(self, tensors: Sequence[Tensor]) -> Tensor:
        return tensors[self.tensor][self.start : self.stop]


def units(numels: Sequence[int], random: Random) -> list[list[Piece]]:
    """Every element once, in lists of pieces that begin at chunk borders."""
    pieces = []
    for k, numel in enumerate(numels):
        borders = [at for at in range(CHUNK, numel, CHUNK) if random.random() < 0.6]
        edges = [0, *borders, numel]
        pieces += [Piece(k, *pair) for pair in pairwise(edges)]
    random.shuffle(pieces)
    found = []
    while pieces:
        size = random.randint(1, 4)
        found.append(pieces[:size])
        pieces = pieces[size:]
    return found


class InRanges:
    """Functions with the signatures of the operators; ``seed`` says how models are cut."""

    def __init__(self, seed: int, threads: int = 1, device: torch.device | None = None) -> None:
        self.random = Random(seed)
        self.where: dict[str, Any] = {"threads": threads, "device": device}

    def _memory(self, numels: Sequence[int], tasks: int, dtype: torch.dtype) -> StateRange:
        """Part of a larger range's memory, at odd places, full of garbage."""
        used = StateRange.empty([sum(numels) + 4096], tasks, dtype)
        used.u.fill_(GARBAGE)
        shift = self.random.randrange(4)
        for plane in used.planes:
            plane.fill_(GARBAGE)
        return StateRange(used.u[shift:], [plane[shift:] for plane in used.planes])

    def _read(
        self, u: Tensor, planes: Sequence[Tensor], numels: Sequence[int], unit: list[Piece]
    ) -> StateRange:
        """A unit's part of a state, as it would be read from a file: nothing between tensors."""
        sizes = [piece.numel for piece in unit]
        part = self._memory(sizes, len(planes), u.dtype).narrowed(sizes)
        for here, there, piece in self._places(unit, numels):
            part.u[here : here + piece.numel] = u[there : there + piece.numel]
            count = (piece.numel + 7) // 8
            for new, old in zip(part.planes, planes, strict=True):
                new[here // 8 : here // 8 + count] = old[there // 8 : there // 8 + count]
        return part

    @staticmethod
    def _places(unit: list[Piece], numels: Sequence[int]) -> Iterator[tuple[int, int, Piece]]:
        """First element of each piece in the unit's arena and in the whole model's."""
        starts = offsets(numels)[0]
        for here, piece in zip(offsets(p.numel for p in unit)[0], unit, strict=True):
            yield here, starts[piece.tensor] + piece.start, piece

    def _fuse(
        self,
        numels: Sequence[int],
        u: Tensor,
        planes: Sequence[Tensor],
        rows: int,
        call: Callable[[list[Piece], StateRange], Tensor],
    ) -> Tensor:
        """``call`` on every unit, its results put in their places in ``u`` and ``planes``."""
        sums = torch.full((rows, chunk_count(numels)), torch.nan, dtype=torch.float64)
        for unit in units(numels, self.random):
            sizes = [piece.numel for piece in unit]
            out = self._memory(sizes, len(planes), u.dtype).narrowed(sizes)
            found = call(unit, out)
            for here, there, piece in self._places(unit, numels):
                size = offsets([piece.numel])[1]  # with the padding that the kernels write
                u[there : there + size] = out.u[here : here + size]
                for new, part in zip(planes, out.planes, strict=True):
                    new[there // 8 : (there + size) // 8] = part[here // 8 : (here + size) // 8]
                column = chunk_count(numels[: piece.tensor]) + piece.start // CHUNK
                count = chunk_count([piece.numel])
                sums[:, column : column + count], found = found[:, :count], found[:, count:]
        return sums

    @staticmethod
    def _new(numels: Sequence[int], tasks: int, dtype: torch.dtype) -> tuple[Tensor, list[Tensor]]:
        size = offsets(numels)[1]
        planes = [torch.empty(size // 8, dtype=torch.uint8) for _ in range(tasks)]
        return torch.empty(size, dtype=dtype), planes

    @staticmethod
    def _via(via: Sequence[int], unit: list[Piece]) -> list[torch.dtype | None]:
        return [VIA_DTYPES[via[piece.tensor]] for piece in unit] if via else []

    def unify(
        self,
        models: Sequence[Tensor],
        base: Sequence[Tensor],
        tasks: int,
        zero_sum: int,
        dtype: torch.dtype,
        via: Sequence[int],
    ) -> tuple[Tensor, list[Tensor], Tensor]:
        count = len(models) // tasks
        by_task = [models[t * count : (t + 1) * count] for t in range(tasks)]
        numels = [t.numel() for t in by_task[0]]

        def call(unit: list[Piece], out: StateRange) -> Tensor:
            return ranges.unify(
                [[piece.of(model) for piece in unit] for model in by_task],
                [piece.of(base) for piece in unit] if base else None,
                out,
                rule=RULES[zero_sum],
                via=self._via(via, unit),
                **self.where,
            )

        u, planes = self._new(numels, tasks, dtype)
        return u, planes, self._fuse(numels, u, planes, 2 * tasks, call)

    def absorb(
        self,
        u: Tensor,
        planes: Sequence[Tensor],
        rescaler: Tensor,
        model: Sequence[Tensor],
        base: Sequence[Tensor],
        zero_sum: int,
        via: Sequence[int],
        in_place: bool = False,
    ) -> tuple[Tensor, list[Tensor], Tensor]:
        numels = [t.numel() for t in model]

        def call(unit: list[Piece], out: StateRange) -> Tensor:
            old = self._read(u, planes, numels, unit)
            into = StateRange(old.u, [*old.planes, out.planes[-1]]) if in_place else out
            sums = ranges.absorb(
                old,
                rescaler[:, [piece.tensor for piece in unit]],
                [piece.of(model) for piece in unit],
                [piece.of(base) for piece in unit] if base else None,
                into,
                rule=RULES[zero_sum],
                via=self._via(via, unit),
                **self.where,
            )
            for target, source in zip([out.u, *out.planes], [into.u, *into.planes], strict=True):
                target.copy_(source)
            return sums

        new_u, new_planes = self._new(numels, len(planes) + 1, u.dtype)
        return new_u, new_planes, self._fuse(numels, new_u, new_planes, len(planes) + 2, call)

    def absorb_(
        self,
        u: Tensor,
        planes: Sequence[Tensor],
        new_plane: Tensor,
        rescaler: Tensor,
        model: Sequence[Tensor],
        base: Sequence[Tensor],
        zero_sum: int,
        via: Sequence[int],
    ) -> Tensor:
        """Each unit in the memory of its part of the old state."""
        new_u, new_planes, sums = self.absorb(
            u, planes, rescaler, model, base, zero_sum, via, in_place=True
        )
        for target, source in zip([u, *planes, new_plane], [new_u, *new_planes], strict=True):
            target.copy_(source)
        return sums

    def merge(
        self,
        u_a: Tensor,
        planes_a: Sequence[Tensor],
        rescaler_a: Tensor,
        u_b: Tensor,
        planes_b: Sequence[Tensor],
        rescaler_b: Tensor,
        numels: Sequence[int],
        zero_sum: int,
    ) -> tuple[Tensor, list[Tensor], Tensor]:
        def call(unit: list[Piece], out: StateRange) -> Tensor:
            columns = [piece.tensor for piece in unit]
            return ranges.merge(
                self._read(u_a, planes_a, numels, unit),
                rescaler_a[:, columns],
                self._read(u_b, planes_b, numels, unit),
                rescaler_b[:, columns],
                [piece.numel for piece in unit],
                out,
                rule=RULES[zero_sum],
                **self.where,
            )

        tasks = len(planes_a) + len(planes_b)
        u, planes = self._new(numels, tasks, u_a.dtype)
        return u, planes, self._fuse(numels, u, planes, tasks, call)

    def decouple_(
        self,
        out: Sequence[Tensor],
        u: Tensor,
        plane: Tensor,
        rescaler: Tensor,
        base: Sequence[Tensor],
        via: Sequence[int],
    ) -> None:
        numels = [t.numel() for t in out]
        for unit in units(numels, self.random):
            ranges.decouple(
                self._read(u, [plane], numels, unit),
                rescaler[[piece.tensor for piece in unit]],
                [piece.of(base) for piece in unit] if base else None,
                [piece.of(out) for piece in unit],
                via=self._via(via, unit),
                **self.where,
            )

    measure = staticmethod(_ops.measure)
