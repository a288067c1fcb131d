"""PAM: one adapter that evolves, aligned with its earlier self while training, then averaged.

Continual Learning in Vision-Language Models via Aligned Model Merging, arXiv 2506.03189.
"""

from __future__ import annotations

import time
from typing import ClassVar

from condu.methods.base import Learned, register
from condu.methods.sequential import Sequential
from condu.pam import AlignedMerging
from condu.tuning import Trained
from condu.weights import copy_weights, load_facts, save_weights
from condu.workspace import Tuning


@register
class PAM(Sequential):
    """As `sequential_lora`, but what each task leaves is merged into what there was."""

    name: ClassVar[str] = "pam"
    tuning: ClassVar[Tuning] = "pam"
    aligns: ClassVar[bool] = True

    def learn(self, index: int) -> Learned:
        if index == 0:  # the first task's adapter is the global one
            return Learned(train=self.tuner.finetune(0).seconds)
        tuner, accelerator = self.tuner, self.workspace.accelerator
        accelerator.wait_for_everyone()  # the main process may still be writing
        start = self._latest(index - 1)
        task = self.workspace.benchmark.tasks[index]
        if start.task == task.name:  # a kill came after this very step
            return self._learned(start, fuse=0.0)
        merging = self._merging()
        with tuner.using({}):
            merging.resume(start.load(), tasks=index)
        trained = tuner.train(
            self.folder / "finetuned.safetensors", index, start=start, after_step=merging.align
        )
        if not accelerator.is_main_process:
            return Learned(train=trained.seconds)
        with tuner.using(trained.load()):
            began = time.perf_counter()
            misaligned = merging.merge()
            fuse = time.perf_counter() - began
            save_weights(
                self._file,
                copy_weights(tuner.live.model, tuner.names),
                task=task.name,
                seconds=repr(trained.seconds),
                loss=repr(trained.loss),
                misaligned=repr(misaligned),
            )
        return self._learned(Trained.open(self._file), fuse)

    def _merging(self) -> AlignedMerging:
        options = self.workspace.config.pam.model_dump(exclude={"rank"})
        return AlignedMerging(self.tuner.live.model, align=self.aligns, **options)

    def _learned(self, merged: Trained, fuse: float) -> Learned:
        misaligned = float(load_facts(merged.path)["misaligned"])
        return Learned(train=merged.seconds, fuse=fuse, misaligned=misaligned)


@register
class LoRAAverage(PAM):
    """The same without aligning: what averaging alone gives."""

    name: ClassVar[str] = "lora_average"
    aligns: ClassVar[bool] = False
