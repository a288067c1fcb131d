"""A number that several seeds were asked for."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass


@dataclass(frozen=True)
class Spread:
    """Mean, least and greatest of `count` measurements."""

    mean: float
    least: float
    greatest: float
    count: int

    @classmethod
    def of(cls, values: Iterable[float | None]) -> Spread | None:
        """Of the values that there are; None if there is none."""
        measured = [float(value) for value in values if value is not None]
        if not measured:
            return None
        mean = math.fsum(measured) / len(measured)
        return cls(mean, min(measured), max(measured), len(measured))

    @property
    def varies(self) -> bool:
        return self.count > 1

    def text(self, number: Callable[[float], str]) -> str:
        """`mean` alone, or `mean (least–greatest)` where there are several."""
        return f"{number(self.mean)} ({self.range(number)})" if self.varies else number(self.mean)

    def range(self, number: Callable[[float], str]) -> str:
        """`least–greatest`; with a word where the dash would meet a minus."""
        between = " to " if self.least < 0 else "–"
        return f"{number(self.least)}{between}{number(self.greatest)}"
