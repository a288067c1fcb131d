"""How ties are elected and how the rescaler is formed: saved with every unified delta."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

ZeroSum = Literal["negative", "positive", "zero"]
Rescale = Literal["global", "tensor_mean", "per_tensor"]


@dataclass(frozen=True)
class FusionRule:
    """The two choices that the ConDU paper leaves open.

    Attributes:
        zero_sum: the sign elected where the deltas add up to exactly zero. ``"negative"`` is what
            the authors' code does, ``"positive"`` what mergekit and PEFT do, ``"zero"`` elects
            nothing there (unified delta 0, no mask bit). 16-bit fine-tunes tie on several percent
            of the moved parameters.
        rescale: the rescaler λ of a task. ``"global"`` is the paper's Σ|d| / Σ|M⊙u| over all
            elements, ``"tensor_mean"`` the authors' code (sums of per-tensor means),
            ``"per_tensor"`` one λ for each task and tensor.

    Raises:
        ValueError: an unknown value.
    """

    zero_sum: ZeroSum = "negative"
    rescale: Rescale = "global"

    def __post_init__(self) -> None:
        for field, kinds in (("zero_sum", get_args(ZeroSum)), ("rescale", get_args(Rescale))):
            if getattr(self, field) not in kinds:
                raise ValueError(
                    f"FusionRule.{field} must be one of {', '.join(kinds)}, "
                    f"not {getattr(self, field)!r}"
                )
