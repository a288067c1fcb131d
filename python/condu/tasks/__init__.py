"""Benchmarks: sequences of image classification or visual question answering tasks."""

from __future__ import annotations

from condu.tasks.benchmark import Benchmark, Task
from condu.tasks.vqa import VqaTask

__all__ = ["Benchmark", "Task", "VqaTask", "load_benchmark"]


def load_benchmark(name: str, *, seed: int = 0) -> Benchmark:
    """The benchmark called ``name``.

    ``"mini"``: small classification tasks, ``"mini_vqa"``: small tasks of visual question
    answering; both are rendered on the fly from ``seed``, no files needed. For images on disk there
    are `condu.tasks.mtil.tasks.mtil_benchmark` and `condu.tasks.folders.folders_benchmark`.
    Raises ValueError for any other name.
    """
    if name == "mini":
        from condu.tasks.mini import mini_benchmark

        return mini_benchmark(seed)
    if name == "mini_vqa":
        from condu.tasks.mini_vqa import mini_vqa_benchmark

        return mini_vqa_benchmark(seed)
    raise ValueError(
        f"unknown benchmark {name!r}, the ones available are: 'mini', 'mini_vqa', 'mtil', 'folders'"
    )
