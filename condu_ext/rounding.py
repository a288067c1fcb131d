"""From which θ_0 a fine-tuned model of a narrower dtype starts: ``match_dtype``."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from condu_ext.layout import ModelSpec


def with_rounding(
    spec: ModelSpec,
    who: str,
    tensors: list[Tensor | None],
    base: list[Tensor | None],
    *,
    match_dtype: bool,
    settled: bool,
) -> ModelSpec:
    """The spec with θ_0 rounded to the fine-tuned model's dtype where that is narrower.

    ``settled`` says that earlier tasks already fixed from which θ_0 they start.

    Raises:
        ValueError: a fine-tuned tensor is narrower than the base's and ``match_dtype`` is off
            (rounding noise would vote on nearly every parameter), or its dtype contradicts the
            θ_0 that earlier tasks started from.
    """
    entries = []
    for entry, theta, theta_0 in zip(spec.tensors, tensors, base, strict=True):
        if theta is None or theta_0 is None:
            entries.append(entry)
            continue
        narrow = torch.promote_types(theta.dtype, theta_0.dtype) != theta.dtype
        if narrow and not match_dtype:
            raise ValueError(
                f"{who}, tensor {entry.name!r}: is {theta.dtype}, narrower than the base's "
                f"{theta_0.dtype}; match_dtype=True rounds the base first"
            )
        via = theta.dtype if narrow else None
        if settled and via != entry.via:
            raise ValueError(
                f"{who}, tensor {entry.name!r}: is {theta.dtype}, but earlier tasks started from "
                f"the base in {entry.via or theta_0.dtype}"
            )
        entries.append(entry if via == entry.via else replace(entry, via=via))
    return replace(spec, tensors=tuple(entries))
