"""What is tuned: all weights of the live model, or low-rank adapters beside frozen ones.

A `Tuner` fine-tunes one or the other on the tasks of a run, keeps the result of each task in a file
once it has it, and puts such results into the live model and takes them out again. Methods that ask
for the same fine-tuning share it. Its live model holds θ_0 whenever nobody is using it.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from torch import Tensor

from condu.bench.memory import peaks, restart_peaks
from condu.record import UNKNOWN_PEAK, PeakBytes
from condu.training import AfterStep, Penalty, finetune
from condu.weights import (
    copy_weights,
    load_facts,
    load_weights,
    put_weights,
    save_weights,
    weights_in,
)

if TYPE_CHECKING:
    from condu.config_sections import TrainingConfig
    from condu.models.base import LiveModel, Scorer
    from condu.workspace import Workspace


@dataclass(frozen=True)
class Trained:
    """Weights in a file, the task that they were last trained on, the seconds that took, the loss
    at the end, and the most memory meanwhile, which a file may not tell."""

    path: Path
    task: str
    seconds: float
    loss: float
    peak: PeakBytes = UNKNOWN_PEAK

    @classmethod
    def open(cls, path: Path) -> Trained:
        """Read the facts in the file's header, not the weights."""
        facts = load_facts(path)
        peak = PeakBytes(**json.loads(facts["peak"])) if "peak" in facts else UNKNOWN_PEAK
        return cls(path, facts["task"], float(facts["seconds"]), float(facts["loss"]), peak)

    def save(self, weights: Mapping[str, Tensor], **more: str) -> None:
        """Write the file: `weights` with these facts, and `more` of them, in its header."""
        save_weights(
            self.path,
            weights,
            task=self.task,
            seconds=repr(self.seconds),
            loss=repr(self.loss),
            peak=json.dumps(asdict(self.peak)),
            **more,
        )

    def load(self) -> dict[str, Tensor]:
        return load_weights(self.path)


class Tuner:
    """Fine-tunes the parameters of `live.model` that require grad now.

    `names`: the entries of the model's state dict that fine-tuning is to change, and so what is
    kept of it; `spoilt`: those that change beside them and have to be put back. `folder`: where
    the fine-tunings from θ_0 are kept.
    """

    def __init__(
        self,
        live: LiveModel,
        training: TrainingConfig,
        workspace: Workspace,
        folder: Path,
        *,
        names: frozenset[str],
        spoilt: frozenset[str] = frozenset(),
    ) -> None:
        self.live = live
        self.training = training
        self.workspace = workspace
        self.folder = folder
        self.names = names
        self.spoilt = spoilt

    @cached_property
    def scorer(self) -> Scorer:
        """Made at first use: only the main process evaluates."""
        return self.workspace.scorer.over(self.live)

    def using(self, weights: Mapping[str, Tensor]) -> AbstractContextManager[None]:
        """Put weights into the live model for a while; θ_0 is back afterwards."""
        return weights_in(self.live.model, weights, self.names | self.spoilt)

    def put(self, trained: Trained) -> None:
        """Put weights into the live model, for somebody who takes them out again."""
        put_weights(self.live.model, trained.load())

    def finetune(self, index: int) -> Trained:
        """Fine-tune on task `index` from θ_0, once in a run whatever the number of methods that ask
        for it. To be called in every process."""
        return self.train(self.file(index), index)

    def finetuned(self, index: int) -> Trained:
        """What `finetune` made of task `index`."""
        return Trained.open(self.file(index))

    def train(
        self,
        path: Path,
        index: int,
        start: Trained | None = None,
        *,
        penalty: Penalty | None = None,
        after_step: AfterStep | None = None,
    ) -> Trained:
        """Fine-tune on task `index`, from `start` or else from θ_0, into the file `path`, unless it
        holds the result already. To be called in every process; the main one writes the file."""
        task = self.workspace.benchmark.tasks[index]
        accelerator = self.workspace.accelerator
        accelerator.wait_for_everyone()  # all of them see the result, or none does
        if not (path.exists() and Trained.open(path).task == task.name):
            restart_peaks(accelerator.device)
            with self.using(start.load() if start else {}):
                began = time.perf_counter()
                loss = finetune(
                    self.live,
                    task,
                    self.training,
                    accelerator,
                    seed=self.workspace.config.seed,
                    progress=self.workspace.progress,
                    penalty=penalty,
                    after_step=after_step,
                    track=self.workspace.tracking.training(path.parent.name, task.name),
                    workers=self.workspace.benchmark.workers,
                )
                seconds = time.perf_counter() - began
                if accelerator.is_main_process:
                    peak = PeakBytes(*peaks(accelerator.device))
                    trained = Trained(path, task.name, seconds, loss, peak)
                    trained.save(copy_weights(self.live.model, self.names))
            restart_peaks(accelerator.device)  # what comes now is no part of the fine-tuning
            origin = f"what was learnt up to {start.task}" if start else "the pretrained model"
            self.workspace.progress.line(
                f"{task.name}: {self.training.steps} steps from {origin} in {seconds:.1f} s, "
                f"loss {loss:.3f}"
            )
            accelerator.wait_for_everyone()
        return Trained.open(path)

    def file(self, index: int) -> Path:
        """Where `finetune` keeps what it makes of task `index`."""
        return self.folder / f"{index:03d}.safetensors"
