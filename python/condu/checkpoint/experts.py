"""Extract on disk: from arguments to a job that writes a task's expert, and its commit."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

from condu.checkpoint.extracting import ExtractJob, others_in, write_index
from condu.checkpoint.matching import find_base
from condu.checkpoint.options import Options
from condu.checkpoint.prepared import Prepared, Records
from condu.checkpoint.sources import Source
from condu.checkpoint.state_files import StateFiles
from condu.checkpoint.states import PathLike, device_of, identity_of, opened, path_of
from condu.checkpoint.target import Target
from condu.checkpoint.world import World

INDEX = "model.safetensors.index.json"


def prepare_extract(
    state: PathLike, task: str, out: PathLike, *, base: PathLike, options: Options, format: str
) -> Prepared:
    """See :func:`condu.checkpoint.extract`."""
    world = World.current()
    with ExitStack() as held:
        with world.step() as step:
            if format not in ("safetensors", "dcp"):
                raise ValueError(f"format must be 'safetensors' or 'dcp', not {format!r}")
            place = _new_place(out)
            opened_state = held.enter_context(StateFiles(path_of("state", state)))
            names = [entry.name for entry in opened_state.manifest.tasks]
            if task not in names:
                raise KeyError(f"unknown task {task!r}; the state holds {', '.join(names)}")
            start = opened(held, base, options, place)
            find_base(opened_state.manifest.spec, start)
            job = ExtractJob(opened_state, names.index(task), start, device_of(options))
            if place.suffix == ".safetensors" and (len(job.shards) > 1 or format == "dcp"):
                raise ValueError(f"{place}: the model takes a folder, not one file")
            home = start.folder
            beside = others_in(home, options.report) if home and world.leads else []
            step.claims["the command"] = identity = identity_of(
                "extract", [start], [task], options, states=[opened_state], format=format
            )
            step.claims["the layout of the model"] = job.layout
        commit = _Commit(job, start, place, format, beside)
        folder = place.with_name(f".{place.name}.unfinished")
        return Prepared(
            job,
            folder,
            identity,
            _left_over,
            commit,
            world,
            options,
            sources=[start],
            states=[opened_state],
            temporary=True,
            held=held.pop_all(),
        )


def _new_place(out: PathLike) -> Path:
    """Where a new model goes, which is renamed to it when it is complete.

    Raises:
        ValueError: something is there that a folder cannot be renamed to.
    """
    place = path_of("out", out).resolve()
    if place.is_dir() and any(place.iterdir()):
        raise ValueError(f"{place} is not empty; name a new folder for the model")
    if place.exists() and not place.is_dir():
        raise ValueError(f"{place} exists already")
    if place == Path.cwd():
        raise ValueError(f"{place} is the current folder; name a new one for the model")
    if place.is_mount():
        raise ValueError(f"{place} is a disk of its own; name a folder on it for the model")
    return place


def _left_over(target: Target) -> list[str]:
    """What an interrupted run of another command left."""
    return [path.name for path in target.folder.iterdir() if not path.name.startswith(".")]


class _Commit:
    """Completes the folder and gives it its name."""

    def __init__(
        self, job: ExtractJob, base: Source, out: Path, format: str, beside: Sequence[Path]
    ) -> None:
        """``beside``: what to copy of the base's folder."""
        self._job, self._base, self._out, self._format = job, base, out, format
        self._beside = beside

    def __call__(self, target: Target, records: Records) -> None:
        if self._out.suffix == ".safetensors":
            (name,) = (file.name for k in records for file in self._job.files(k, 0))
            target.commit_file(name, self._out)
            return
        if (index := self._job.index()) is not None:
            existing = getattr(self._base, "index", None)
            write_index(index, target.folder / (existing.name if existing else INDEX))
        if self._format == "dcp":
            from condu.checkpoint.dcp import write_dcp

            write_dcp(target.folder)
        if (folder := self._base.folder) is not None:
            for file in self._beside:
                to = target.folder / file
                to.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(folder / file, to)
        target.commit_folder(self._out)

    def others(self, generation: int) -> dict[str, int]:
        if self._out.suffix == ".safetensors":
            return {}
        folder = self._base.folder or Path()
        return {str(file): (folder / file).stat().st_size for file in self._beside}
