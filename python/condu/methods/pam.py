"""PAM: one adapter that evolves, aligned with its earlier self while training, then averaged.

Continual Learning in Vision-Language Models via Aligned Model Merging, arXiv 2506.03189.
"""

from __future__ import annotations

import time
from typing import ClassVar

from condu.methods.base import register
from condu.methods.merging import Merged, Merging
from condu.pam import AlignedMerging
from condu.record import Learned
from condu.tuning import Trained
from condu.weights import copy_weights, load_facts
from condu.workspace import Tuning


@register
class PAM(Merging):
    """As `sequential_lora`, but what each task leaves is merged into what there was."""

    name: ClassVar[str] = "pam"
    tuning: ClassVar[Tuning] = "pam"
    aligns: ClassVar[bool] = True
    _merging: AlignedMerging

    def learn(self, index: int) -> Learned:
        if index == 0:  # the first task's adapter is the global one
            return Learned.by(self.tuner.finetune(0))
        return super().learn(index)

    def train(self, index: int, start: Trained | None) -> Trained:
        assert start is not None  # only the first task has none
        tuner = self.tuner
        options = self.workspace.config.pam.model_dump(exclude={"rank"})
        self._merging = AlignedMerging(tuner.live.model, align=self.aligns, **options)
        with tuner.using({}):
            self._merging.resume(start.load(), tasks=index)
        return tuner.train(
            self.folder / "finetuned.safetensors",
            index,
            start=start,
            after_step=self._merging.align,
        )

    def merge(self, start: Trained | None, trained: Trained) -> Merged:
        tuner = self.tuner
        with tuner.using(trained.load()):
            began = time.perf_counter()
            misaligned = self._merging.merge()
            seconds = time.perf_counter() - began
            weights = copy_weights(tuner.live.model, tuner.names)
        return Merged(weights, seconds, {"misaligned": repr(misaligned)})

    def learned(self, merged: Trained, fuse: float) -> Learned:
        misaligned = float(load_facts(merged.path)["misaligned"])
        return Learned.by(merged, fuse=fuse, misaligned=misaligned)


@register
class LoRAAverage(PAM):
    """The same without aligning: what averaging alone gives."""

    name: ClassVar[str] = "lora_average"
    aligns: ClassVar[bool] = False
