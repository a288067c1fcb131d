"""Benchmarks: sequences of image classification tasks with class names and prompts."""

from __future__ import annotations

from condu.tasks.benchmark import Benchmark, Task

__all__ = ["Benchmark", "Task", "load_benchmark"]


def load_benchmark(name: str, *, seed: int = 0) -> Benchmark:
    """The benchmark called ``name``.

    ``"mini"``: small tasks rendered on the fly from ``seed``, no files needed.
    Raises ValueError for any other name.
    """
    if name == "mini":
        from condu.tasks.mini import mini_benchmark

        return mini_benchmark(seed)
    raise ValueError(f"unknown benchmark {name!r}, the ones available are: 'mini'")
