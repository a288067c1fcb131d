"""What the methods of one run share: the live model, one fine-tuning per task, the evaluator."""

from __future__ import annotations

import time
from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from torch import Tensor

from condu.evaluation import Evaluator
from condu.progress import RunProgress
from condu.training import finetune
from condu.weights import copy_weights, load_facts, load_weights, save_weights, weights_in

if TYPE_CHECKING:
    from accelerate import Accelerator

    from condu.config import RunConfig
    from condu.models.clip import ClipModel
    from condu.tasks.benchmark import Benchmark


@dataclass(frozen=True)
class Trained:
    """Weights in a file, the task that they were last trained on, the seconds that took, and the
    loss at the end."""

    path: Path
    task: str
    seconds: float
    loss: float

    @classmethod
    def open(cls, path: Path) -> Trained:
        """Read the facts in the file's header, not the weights."""
        facts = load_facts(path)
        return cls(path, facts["task"], float(facts["seconds"]), float(facts["loss"]))

    def load(self) -> dict[str, Tensor]:
        return load_weights(self.path)


class Workspace:
    """Shared by all methods of a run. `clip.model` holds θ_0 whenever nobody is using it."""

    def __init__(
        self,
        clip: ClipModel,
        benchmark: Benchmark,
        config: RunConfig,
        folder: Path,
        accelerator: Accelerator,
        progress: RunProgress,
    ) -> None:
        self.clip = clip
        self.benchmark = benchmark
        self.config = config
        self.folder = folder
        self.accelerator = accelerator
        self.progress = progress
        clip.model.to(accelerator.device).eval()
        self._zero_shot: dict[int, float] = {}

    @cached_property
    def evaluator(self) -> Evaluator:
        """Made at first use: only the main process evaluates."""
        batch_size = self.config.evaluation.batch_size
        return Evaluator(self.clip, self.benchmark, batch_size=batch_size)

    def using(self, weights: Mapping[str, Tensor]) -> AbstractContextManager[None]:
        """Put weights into the live model for a while; θ_0 is back afterwards."""
        return weights_in(self.clip.model, weights)

    def finetune(self, index: int) -> Trained:
        """Fine-tune on task `index` from θ_0, once in a run whatever the number of methods that ask
        for it. To be called in every process."""
        return self.train(self._finetuned_file(index), index)

    def finetuned(self, index: int) -> Trained:
        """What `finetune` made of task `index`."""
        return Trained.open(self._finetuned_file(index))

    def train(self, path: Path, index: int, start: Trained | None = None) -> Trained:
        """Fine-tune on task `index`, from `start` or else from θ_0, into the file `path`, unless it
        holds the result already. To be called in every process; the main one writes the file."""
        task = self.benchmark.tasks[index]
        self.accelerator.wait_for_everyone()  # all of them see the result, or none does
        if not (path.exists() and Trained.open(path).task == task.name):
            with self.using(start.load() if start else {}):
                began = time.perf_counter()
                loss = finetune(
                    self.clip,
                    task,
                    self.config.training,
                    self.accelerator,
                    seed=self.config.seed,
                    progress=self.progress,
                )
                seconds = time.perf_counter() - began
                if self.accelerator.is_main_process:
                    save_weights(
                        path,
                        copy_weights(self.clip.model),
                        task=task.name,
                        seconds=repr(seconds),
                        loss=repr(loss),
                    )
            steps = self.config.training.steps
            origin = f"the model after {start.task}" if start else "the pretrained model"
            self.progress.line(
                f"{task.name}: {steps} steps from {origin} in {seconds:.1f} s, loss {loss:.3f}"
            )
            self.accelerator.wait_for_everyone()
        return Trained.open(path)

    def zero_shot_accuracy(self, index: int) -> float:
        """Accuracy (percent) of θ_0 on the dataset of task `index`, measured once."""
        if index not in self._zero_shot:
            self._zero_shot[index] = self.evaluator.accuracy(self.benchmark.tasks[index])
        return self._zero_shot[index]

    def _finetuned_file(self, index: int) -> Path:
        return self.folder / "finetuned" / f"{index:03d}.safetensors"
