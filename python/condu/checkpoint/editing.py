"""Tasks of a unified checkpoint dropped and renamed where it lies.

As in memory (:meth:`condu_ext.UnifiedDelta.drop`) the unified delta does not change, so nothing but
``config.json`` is written; to replace a task, drop it and absorb it again.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

from condu_ext import files
from condu_ext.manifest import CONFIG, Manifest, TaskEntry, read_manifest
from condu_ext.storage import writer_lock
from condu_ext.unified import check_task_name


def drop(state: str | os.PathLike[str], task: str) -> None:
    """Forget a task: its masks, sums and private tensors. The other tasks, and the unified delta,
    stay as they are; the last task may be dropped too.

    Args:
        state: folder of the unified checkpoint, changed in place, as one step.

    Raises:
        FileNotFoundError, CheckpointError: the folder holds no state that can be read.
        KeyError: there is no such task.
        OSError: the folder cannot be written; the state stays what it was.
        RuntimeError: another process is writing there.
    """
    directory = Path(state)
    read_manifest(directory)  # before the lock makes a file in a folder that is none of ours
    with writer_lock(directory):
        manifest = read_manifest(directory)
        rest = list(manifest.tasks)
        dropped = rest.pop(_position(directory, rest, task))
        of_task = tuple(
            f"{kind}-{manifest.generation}-{dropped.number}-" for kind in ("triggers", "private")
        )
        old = [name for name in manifest.files if name.startswith(of_task)]
        kept = {name: manifest.files[name] for name in manifest.files if name not in old}
        _commit(directory, replace(manifest, tasks=rest, files=kept))
        with suppress(OSError):  # the task is dropped; the next save cleans up
            for name in old:
                (directory / name).unlink(missing_ok=True)


def rename(state: str | os.PathLike[str], task: str, name: str) -> None:
    """Give a task another name.

    Raises:
        ValueError: the new name is empty or in use. And as :func:`drop`.
    """
    directory = Path(state)
    read_manifest(directory)
    with writer_lock(directory):
        manifest = read_manifest(directory)
        tasks = list(manifest.tasks)
        position = _position(directory, tasks, task)
        if check_task_name(name) in (entry.name for entry in tasks):
            raise ValueError(f"{directory}: task {name!r} is already in the state")
        tasks[position] = replace(tasks[position], name=name)
        _commit(directory, replace(manifest, tasks=tasks))


def _position(directory: Path, tasks: Sequence[TaskEntry], task: str) -> int:
    names = [entry.name for entry in tasks]
    if task not in names:
        held = ", ".join(names) or "none"
        raise KeyError(f"{directory}: unknown task {task!r}; the state holds {held}")
    return names.index(task)


def _commit(directory: Path, manifest: Manifest) -> None:
    text = manifest.to_json()
    files.replace(directory / CONFIG, lambda file: file.write_text(text, "utf-8"))
