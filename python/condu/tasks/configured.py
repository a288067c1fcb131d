"""The benchmark that a configuration describes."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

from condu.config import ConfigError, RunConfig
from condu.config_sections import ON_DISK, BenchmarkConfig
from condu.tasks import load_benchmark
from condu.tasks.benchmark import Benchmark
from condu.tasks.folders import folders_benchmark, task_names
from condu.tasks.images import DataError
from condu.tasks.mtil import ORDERS
from condu.tasks.mtil.tasks import mtil_benchmark


def make_benchmark(config: RunConfig) -> Benchmark:
    """The benchmark of a configuration: the tasks of its order, and of these the first.
    `ConfigError` if it names tasks that the benchmark does not have, or one twice, or wants more
    than there are."""
    wanted = config.benchmark
    if wanted.name == "mtil":
        names = list(ORDERS["I"])
    elif wanted.name == "folders":
        try:
            names = task_names(_root(wanted))
        except DataError as error:
            raise ConfigError(f"benchmark.root: {error}") from None
    else:
        benchmark = load_benchmark(wanted.name, seed=wanted.seed)
        names = [task.name for task in benchmark]
    for key, given in (
        ("benchmark.order", wanted.order or ()),
        ("training.task_lr", tuple(config.training.task_lr)),
        ("lora.task_lr", tuple(config.lora.task_lr)),
    ):
        strangers = [name for name in given if name not in names]
        if strangers:
            raise ConfigError(
                f"{key}: benchmark {wanted.name!r} has no task {strangers[0]!r}, "
                f"there are: {', '.join(names)}"
            )
    order = names if wanted.order is None else list(wanted.order)
    if twice := [name for name in order if order.count(name) > 1]:
        raise ConfigError(f"benchmark.order: {twice[0]!r} is listed twice")
    count = wanted.tasks or len(order)
    if count > len(order):
        raise ConfigError(f"benchmark.tasks: got {count}, but there are {len(order)} tasks")
    if wanted.name in ON_DISK:  # only what is used has to be there
        return _on_disk(wanted, order[:count])
    return benchmark.order(order).subset(count)


def _on_disk(wanted: BenchmarkConfig, names: Sequence[str]) -> Benchmark:
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    if wanted.download and processes > 1:  # they would write the same files
        raise ConfigError(
            f"benchmark.download: only a single process may download, there are {processes}; "
            "run without the launcher until the data sets are there"
        )
    workers = 4 if wanted.workers is None else wanted.workers
    chosen: dict[str, Any] = {"shots": wanted.shots, "seed": wanted.seed, "workers": workers}
    if wanted.name == "folders":
        return folders_benchmark(_root(wanted), names, **chosen)
    return mtil_benchmark(_root(wanted), names, download=wanted.download, **chosen)


def _root(wanted: BenchmarkConfig) -> str:
    assert wanted.root is not None  # the configuration has seen to it
    return wanted.root
