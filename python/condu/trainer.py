"""The loop over tasks and methods, on disk after every step of it."""

from __future__ import annotations

import math
import os
import platform
import time
from collections.abc import Sequence
from dataclasses import asdict
from datetime import timedelta
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from accelerate import Accelerator, DataLoaderConfiguration, InitProcessGroupKwargs

import condu_ext
from condu.config import ConfigError, RunConfig
from condu.methods import METHODS, Method
from condu.metrics import summarize
from condu.models import load_model
from condu.progress import RunProgress
from condu.runfolder import MethodProgress, Progress, RunFolder
from condu.tasks.configured import make_benchmark
from condu.workspace import Workspace

if TYPE_CHECKING:
    from condu.evaluation import Protocol
    from condu.models.base import LiveModel
    from condu.tasks.benchmark import Benchmark

EVALUATION_LIMIT = timedelta(hours=12)
"""How long the other processes wait for the main one, which alone fuses and evaluates."""


class ContinualTrainer:
    """Takes the methods of a configuration through a benchmark, task by task.

    `live.model` holds θ_0 now and again after `run`. `out` is the run folder, see
    `condu.runfolder`. One seed makes a run repeatable: bit for bit on a CPU with as many threads,
    on a GPU as far as torch's kernels are deterministic.
    """

    def __init__(
        self,
        live: LiveModel,
        benchmark: Benchmark,
        config: RunConfig,
        out: str | os.PathLike[str],
        *,
        progress: RunProgress | None = None,
    ) -> None:
        self.live = live
        self.benchmark = benchmark
        self.config = config
        self.out = Path(out)
        self.progress = progress or RunProgress()

    @classmethod
    def from_config(
        cls, config: RunConfig, out: str | os.PathLike[str], *, progress: RunProgress | None = None
    ) -> ContinualTrainer:
        """Load the model and the benchmark that a configuration names. `ConfigError` if it names
        tasks that the benchmark does not have, or a model that cannot answer them."""
        benchmark = make_benchmark(config)  # first, for a model may have to be downloaded
        live = load_model(config.model.name, config.model.pretrained)
        for task in benchmark:
            if not isinstance(task, live.task_type):
                raise ConfigError(
                    f"model.name: {live.name!r} does not answer the tasks of benchmark "
                    f"{benchmark.name!r}"
                )
        return cls(live, benchmark, config, out, progress=progress)

    def run(self, resume: bool = False) -> dict[str, Any]:
        """Run to the end and return what `results.json` holds. With `resume` a run that was killed
        goes on after its last finished step, and ends with the numbers it would have had.

        Raises `RunFolderError` if the folder holds a run and `resume` is not given, or holds one
        with another configuration; `ConfigError` and ValueError before anything is trained, for
        what the configuration has wrong.
        """
        accelerator = Accelerator(
            mixed_precision=self.config.mixed_precision,
            # batch_size is the whole batch: the number of processes does not change the training
            dataloader_config=DataLoaderConfiguration(split_batches=True),
            kwargs_handlers=[InitProcessGroupKwargs(timeout=EVALUATION_LIMIT)],
        )
        launched = int(os.environ.get("WORLD_SIZE", "1"))
        if launched != accelerator.num_processes:  # each would take itself for the main one
            raise ConfigError(
                f"{launched} processes were launched, but accelerate found no way to join them: "
                "without a GPU it needs ACCELERATE_USE_CPU=true"
            )
        with accelerator.main_process_first():
            starts = accelerator.is_main_process and not resume
            folder = (RunFolder.create if starts else RunFolder.resume)(self.out, self.config)
        names = [task.name for task in self.benchmark]
        progress = folder.load_progress(names)
        workspace = Workspace(
            self.live, self.benchmark, self.config, folder.path, accelerator, self.progress
        )
        methods = [METHODS[name](workspace) for name in self.config.methods]
        for method in methods:  # what the configuration has wrong shows before anything is trained
            self._protocols_of(method)
            workspace.tuner(method.tuning)
        for index in range(len(names)):
            for method in methods:
                self._step(method, index, progress, folder, accelerator)
        if accelerator.is_main_process:
            folder.save_results(self._results(progress))
        accelerator.wait_for_everyone()
        return folder.load_results()

    def _step(
        self,
        method: Method,
        index: int,
        progress: Progress,
        folder: RunFolder,
        accelerator: Accelerator,
    ) -> None:
        """One method learns one task and is evaluated on all, unless that is on disk already."""
        protocols = self._protocols_of(method)
        done = progress.methods.setdefault(
            method.name, MethodProgress(rows={protocol: [] for protocol in protocols})
        )
        if done.learned > index:
            return
        learned = method.learn(index)
        if not accelerator.is_main_process:  # waits for the main one when it next trains
            return
        began = time.perf_counter()
        rows = method.rows(index, protocols)
        done.train += learned.train
        done.fuse += learned.fuse
        done.evaluate += learned.evaluate + time.perf_counter() - began
        if learned.misaligned is not None:
            done.misaligned.append(learned.misaligned)
        for protocol, row in rows.items():
            done.rows[protocol].append(row.accuracy)
        folder.save_progress(progress)
        seen = {
            protocol: sum(row.accuracy[: index + 1]) / (index + 1) for protocol, row in rows.items()
        }
        self.progress.line(
            f"after task {index + 1} of {len(self.benchmark)}, {method.name} on the tasks so far: "
            + ", ".join(f"{protocol} {accuracy:.1f} %" for protocol, accuracy in seen.items())
        )

    def _protocols_of(self, method: Method) -> list[Protocol]:
        protocols = [p for p in self.config.protocols if p in method.protocols]
        if not protocols:
            raise ConfigError(
                f"methods: {method.name!r} on model {self.live.name!r} needs the protocol "
                f"{' or '.join(method.protocols)}, but protocols has only: "
                f"{', '.join(self.config.protocols)}"
            )
        return protocols

    def _results(self, progress: Progress) -> dict[str, Any]:
        methods: dict[str, Any] = {}
        for name, done in progress.methods.items():
            methods[name] = {protocol: _table(rows) for protocol, rows in done.rows.items()}
            methods[name]["seconds"] = {
                "train": done.train,
                "fuse": done.fuse,
                "evaluate": done.evaluate,
            }
            if done.misaligned:
                methods[name]["misaligned"] = done.misaligned
        return {
            "benchmark": self.benchmark.name,
            "seed": self.config.seed,
            "tasks": progress.tasks,
            "methods": methods,
            "versions": versions(),
            "machine": {"cpus": os.cpu_count(), "threads": torch.get_num_threads()},
        }


def versions() -> dict[str, str]:
    """Versions of what the numbers of a run depend on, and the instruction set of the kernels."""
    return {
        "condu": metadata.version("condu"),
        "condu_ext": str(condu_ext.build_info()["version"]),
        "condu_ext_isa": str(condu_ext.build_info()["cpu_isa"]),
        "open_clip": metadata.version("open_clip_torch"),
        "transformers": metadata.version("transformers"),
        "peft": metadata.version("peft"),
        "accelerate": metadata.version("accelerate"),
        "torch": torch.__version__,
        "python": platform.python_version(),
    }


def _table(rows: Sequence[Sequence[float]]) -> dict[str, Any]:
    """A matrix with its summary; what is not defined for a single task is null."""
    return {"matrix": rows} | {
        metric: None if math.isnan(value) else value
        for metric, value in asdict(summarize(rows)).items()
    }
