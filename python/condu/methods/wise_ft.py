"""WiSE-FT: after each task, the weights go part of the way back to where they came from.

Robust fine-tuning of zero-shot models, arXiv 2109.01903; in a sequence of tasks, and with the share
0.8, as ZSCL (arXiv 2303.06628) and its code compare with it.
"""

from __future__ import annotations

import time
from typing import ClassVar

import condu_ext as cx
from condu.methods.base import register
from condu.methods.merging import Merged, Merging
from condu.tuning import Trained
from condu.weights import copy_weights


@register
class WiSEFT(Merging):
    """θ ← a·θ + (1 − a)·θ_prev after every task, the first included, where θ_prev is what the
    task's fine-tuning started from and a is `wise_ft.weight`. Integer buffers are θ's."""

    name: ClassVar[str] = "wise_ft"
    shares_first: ClassVar[bool] = False

    def train(self, index: int, start: Trained | None) -> Trained:
        if start is None:
            return self.tuner.finetune(index)
        return self.tuner.train(self.folder / "finetuned.safetensors", index, start=start)

    def merge(self, start: Trained | None, trained: Trained) -> Merged:
        weights = trained.load()
        previous = start.load() if start else copy_weights(self.tuner.live.model)
        began = time.perf_counter()
        moved = {name: value for name, value in weights.items() if value.is_floating_point()}
        joined = {name: previous[name] for name in moved}
        cx.average_(joined, moved, 1 - self.workspace.config.wise_ft.weight)
        return Merged(weights | joined, time.perf_counter() - began, {})
