"""The fine-tuned models that the theorems are looked at on: those of runs, and more in a folder.

FOLDER/config.yaml                  what is fine-tuned, written first
FOLDER/seed-<seed>/finetuned/…      one fine-tuned model a task, as a run keeps them
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import count, islice
from pathlib import Path
from typing import TYPE_CHECKING

from accelerate import Accelerator
from rich.filesize import decimal

from condu.config import RunConfig, difference, load_config
from condu.progress import RunProgress
from condu.runfolder import RunFolder, RunFolderError
from condu.theory.deltas import FineTunedDeltas
from condu.tuning import Trained, Tuner
from condu.weights import copy_weights
from condu.workspace import Workspace
from condu_ext.files import PART

if TYPE_CHECKING:
    from condu.models.base import LiveModel
    from condu.tasks.benchmark import Benchmark


def fine_tuning_of(config: RunConfig, seed: int | None = None) -> RunConfig:
    """The part of a configuration that decides its fine-tunings of all weights, with another seed
    if one is given; everything else has its default."""
    return RunConfig(
        benchmark=config.benchmark,
        model=config.model,
        methods=("individual",),
        training=config.training,
        seed=config.seed if seed is None else seed,
        mixed_precision=config.mixed_precision,
    )


def fine_tuning_of_runs(runs: Sequence[Path]) -> tuple[RunConfig, dict[int, Path]]:
    """The fine-tuning of runs that differ in nothing but the seed, with the first one's; and the
    runs by their seeds.

    Raises RunFolderError for a folder that is none of a run, for one that was fine-tuned otherwise
    than the first, and for one of the same seed as another.
    """
    by_seed: dict[int, Path] = {}
    configs = []
    for run in runs:
        file = RunFolder(run).config_file
        if not file.exists():
            raise RunFolderError(f"{run} is not the folder of a run: there is no {file.name} in it")
        config = load_config(file)
        configs.append(fine_tuning_of(config))
        if changed := difference(configs[0], fine_tuning_of(config, configs[0].seed)):
            raise RunFolderError(f"{runs[0]} and {run} were fine-tuned differently: {changed}")
        if config.seed in by_seed:
            raise RunFolderError(f"{by_seed[config.seed]} and {run} have the seed {config.seed}")
        by_seed[config.seed] = run
    return configs[0], by_seed


@dataclass
class FineTunings:
    """Fine-tunes `live` on the tasks of a benchmark, seed after seed, from θ_0 each time.

    config: as `fine_tuning_of` makes it; its seed is the first. runs: runs by their seeds, whose
    models come first. folder: where further ones are kept, and found again.
    """

    live: LiveModel
    benchmark: Benchmark
    config: RunConfig
    runs: Mapping[int, Path]
    folder: Path
    progress: RunProgress

    @property
    def of_runs(self) -> int:
        """How many models the runs have."""
        return len(self.runs) * len(self.benchmark)

    def deltas(self, number: int) -> FineTunedDeltas:
        """The first `number` models' deltas; those that are in no file yet are trained, after a
        line of progress that says how many these are.

        Raises RunFolderError before anything is trained, if the folder was begun with another
        configuration or is not one of these, or a run lacks a model.
        """
        if self._is_foreign():
            raise RunFolderError(
                f"{self.folder} holds something else: choose a folder that is new, empty, or one "
                "that this command made"
            )
        RunFolder.resume(self.folder, self.config)
        kept = list(islice(self._of_runs(), number))
        accelerator = Accelerator(mixed_precision=self.config.mixed_precision)
        space = self._workspace(self.config.seed, accelerator)
        space.tuner("full")  # decides which parameters are trained
        model = self.live.model
        trained = {name for name, p in model.named_parameters() if p.requires_grad}
        pretrained = copy_weights(model, trained)
        further = list(islice(self._further(accelerator), number - len(kept)))
        self._announce(number, further)
        models = [*kept, *((name, tuner.finetune(index).path) for name, tuner, index in further)]
        return FineTunedDeltas(
            [name for name, _ in models], [file for _, file in models], pretrained
        )

    def _announce(self, number: int, further: Sequence[tuple[str, Tuner, int]]) -> None:
        """It may be days of work and much of a disk."""
        missing = sum(not tuner.file(index).exists() for _, tuner, index in further)
        if missing:
            entries = self.live.model.state_dict().values()
            size = decimal(missing * sum(tensor.nbytes for tensor in entries))
            self.progress.line(
                f"{number} models: {number - missing} there, {missing} to be fine-tuned, "
                f"which takes {size} in {self.folder}"
            )

    def _is_foreign(self) -> bool:
        return (
            self.folder.exists()
            and not RunFolder(self.folder).config_file.exists()
            and any(entry.suffix != PART for entry in self.folder.iterdir())
        )

    def _of_runs(self) -> Iterator[tuple[str, Path]]:
        for seed, run in self.runs.items():
            for index, task in enumerate(self.benchmark):
                file = run / "finetuned" / f"{index:03d}.safetensors"
                if not file.exists() or Trained.open(file).task != task.name:
                    raise RunFolderError(
                        f"{run} has no model fine-tuned with all weights on task {task.name!r}: "
                        f"{file} is not there or of another task"
                    )
                yield f"{task.name}, seed {seed}", file

    def _further(self, accelerator: Accelerator) -> Iterator[tuple[str, Tuner, int]]:
        """Fine-tunings of other seeds than the runs': the name, and a task's index at a tuner."""
        for seed in count(self.config.seed):
            if seed in self.runs:
                continue
            tuner = self._workspace(seed, accelerator).tuner("full")
            for index, task in enumerate(self.benchmark):
                yield f"{task.name}, seed {seed}", tuner, index

    def _workspace(self, seed: int, accelerator: Accelerator) -> Workspace:
        return Workspace(
            self.live,
            self.benchmark,
            fine_tuning_of(self.config, seed),
            self.folder / f"seed-{seed}",
            accelerator,
            self.progress,
        )
