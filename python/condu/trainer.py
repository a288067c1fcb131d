"""The loop over tasks and methods, on disk after every step of it."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from contextlib import ExitStack
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import xxhash
from accelerate import Accelerator, DataLoaderConfiguration, InitProcessGroupKwargs

from condu.bench.memory import peaks, restart_peaks
from condu.config import ConfigError, RunConfig
from condu.evaluation import Evaluator
from condu.feature_sample import save_feature_sample
from condu.methods import METHODS, Method
from condu.models import load_model
from condu.models.clip import ClipModel
from condu.progress import RunProgress
from condu.record import (
    Basis,
    PeakBytes,
    PhasePeaks,
    Progress,
    Session,
    TaskData,
    Unevaluated,
    machine_of,
)
from condu.results import results_of
from condu.runfolder import RunFolder
from condu.tasks.benchmark import Task
from condu.tasks.configured import make_benchmark
from condu.tracking import check_trackers
from condu.workspace import Workspace
from condu_ext.fingerprint import fingerprint

if TYPE_CHECKING:
    from condu.evaluation import Protocol
    from condu.models.base import LiveModel, Scorer
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
        try:
            with torch.random.fork_rng(devices=[]):  # for weights that are drawn
                torch.default_generator.manual_seed(config.seed)
                live = load_model(config.model.name, config.model.pretrained)
        except ValueError as error:
            raise ConfigError(f"model: {error}") from None
        if isinstance(live, ClipModel) and live.name != "mini" and config.model.pretrained is None:
            (progress or RunProgress()).line(
                f"model {live.name} has random weights, for model.pretrained is not given"
            )
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
        check_trackers(self.config)
        accelerator = Accelerator(
            mixed_precision=self.config.mixed_precision,
            # batch_size is the whole batch: the number of processes does not change the training
            dataloader_config=DataLoaderConfiguration(split_batches=True),
            kwargs_handlers=[InitProcessGroupKwargs(timeout=EVALUATION_LIMIT)],
            log_with=list(self.config.trackers) or None,
            project_dir=self.out / "tracking",
        )
        launched = int(os.environ.get("WORLD_SIZE", "1"))
        if launched != accelerator.num_processes:  # each would take itself for the main one
            raise ConfigError(
                f"{launched} processes were launched, but accelerate found no way to join them: "
                "without a GPU it needs ACCELERATE_USE_CPU=true"
            )
        folder = RunFolder(self.out)
        if accelerator.is_main_process and not resume:
            folder.check_unused()
        else:
            folder.check_resumable(self.config)
        basis = self.basis()
        folder.load_progress(basis)
        workspace = Workspace(
            self.live, self.benchmark, self.config, folder.path, accelerator, self.progress
        )
        methods = [METHODS[name](workspace) for name in self.config.methods]
        for method in methods:  # what the configuration has wrong shows before anything is trained
            self._protocols_of(method)
            workspace.tuner(method.tuning)
        with accelerator.main_process_first():
            folder.begin(self.config)
        with ExitStack() as stack:
            if accelerator.is_main_process:
                stack.enter_context(folder.locked())
            return self._run(folder, folder.load_progress(basis), workspace, methods)

    def basis(self) -> Basis:
        """What the run is over; the live model has to hold θ_0."""
        tasks: list[Any] = [task for task in self.benchmark if isinstance(task, Task)]
        data = {
            task.name: TaskData(
                list(task.classnames), len(task.load("train")), len(task.load("test"))
            )
            for task in tasks
        }
        digest = xxhash.xxh3_64()
        for name, tensor in self.live.model.state_dict().items():
            digest.update(f"{name} {fingerprint(tensor)}\n".encode())
        return Basis([task.name for task in self.benchmark], data, digest.hexdigest())

    def _run(
        self,
        folder: RunFolder,
        progress: Progress,
        workspace: Workspace,
        methods: Sequence[Method],
    ) -> dict[str, Any]:
        accelerator = workspace.accelerator
        with workspace.tracking.started(self.config, folder.path):
            for index in range(len(self.benchmark)):
                for method in methods:
                    self._step(method, index, progress, folder, workspace)
        if accelerator.is_main_process:
            if not folder.results_file.exists():  # a run that had finished stays as it was
                machine = machine_of(accelerator.device, accelerator.num_processes)
                folder.save_results(results_of(progress, self.benchmark, self.config, machine))
            self._save_features(folder, workspace.scorer)  # last: only a picture needs them
        accelerator.wait_for_everyone()
        return folder.load_results()

    def _step(
        self,
        method: Method,
        index: int,
        progress: Progress,
        folder: RunFolder,
        workspace: Workspace,
    ) -> None:
        """One method learns one task and is evaluated on all, unless that is on disk already."""
        protocols = self._protocols_of(method)
        done = progress.methods.setdefault(method.name, [])
        if len(done) > index:
            return
        accelerator = workspace.accelerator
        restart_peaks(accelerator.device)
        learned = method.learn(index)
        if not accelerator.is_main_process:  # waits for the main one when it next trains
            return
        own = PeakBytes(*peaks(accelerator.device))  # since the last fine-tuning, if there was one
        before = progress.unevaluated.get(method.name)
        if before and before.index == index:  # a kill came after the learning, which took this
            learned, own = before.learned, before.peak
        else:
            progress.unevaluated[method.name] = Unevaluated(index, learned, own)
            folder.save_progress(progress)
        restart_peaks(accelerator.device)
        began = time.perf_counter()
        rows = method.rows(index, protocols)
        evaluate = learned.evaluate + time.perf_counter() - began
        peak = PhasePeaks(
            train=learned.peak or (own if learned.train else None),
            fuse=own if learned.fuse else None,
            evaluate=PeakBytes(*peaks(accelerator.device)),
        )
        done.append(
            Session(
                rows,
                train=learned.train,
                fuse=learned.fuse,
                evaluate=evaluate,
                peak_bytes=peak,
                misaligned=learned.misaligned,
                fused=method.fused(index),
            )
        )
        del progress.unevaluated[method.name]
        folder.save_progress(progress)
        workspace.tracking.session(method.name, progress.basis.tasks, done)
        seen = {
            protocol: sum(row.accuracy[: index + 1]) / (index + 1) for protocol, row in rows.items()
        }
        self.progress.line(
            f"after task {index + 1} of {len(self.benchmark)}, {method.name} on the tasks so far: "
            + ", ".join(f"{protocol} {accuracy:.1f} %" for protocol, accuracy in seen.items())
        )

    def _save_features(self, folder: RunFolder, scorer: Scorer) -> None:
        if self.live.votes and not folder.feature_file.exists():
            assert isinstance(scorer, Evaluator)  # of a model that votes
            save_feature_sample(folder.feature_file, scorer, seed=self.config.seed)

    def _protocols_of(self, method: Method) -> list[Protocol]:
        protocols = [p for p in self.config.protocols if p in method.protocols]
        if not protocols:
            raise ConfigError(
                f"methods: {method.name!r} on model {self.live.name!r} needs the protocol "
                f"{' or '.join(method.protocols)}, but protocols has only: "
                f"{', '.join(self.config.protocols)}"
            )
        return protocols
