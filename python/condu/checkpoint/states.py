"""Unify, absorb and merge on disk: from arguments to a job that writes a state, and its commit."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import xxhash

from condu.checkpoint.committing import Commit, Unchanged, left_over
from condu.checkpoint.fusing import Absorbing, Merging, Unifying
from condu.checkpoint.inputs import Models
from condu.checkpoint.matching import describe, find_base, logical, match
from condu.checkpoint.memory import resident
from condu.checkpoint.options import Options
from condu.checkpoint.prepared import Prepared
from condu.checkpoint.sources import Source, open_source
from condu.checkpoint.state_files import StateFiles
from condu.checkpoint.state_job import StateJob
from condu.checkpoint.tensor_files import seen
from condu.checkpoint.world import World
from condu_ext.manifest import CONFIG, Manifest, generation_of, read_manifest
from condu_ext.rule import FusionRule
from condu_ext.unified import check_state_dtype, check_task_name

PathLike = str | os.PathLike[str]


def prepare_unify(
    base: PathLike,
    tasks: Mapping[str, PathLike],
    out: PathLike,
    *,
    rule: FusionRule,
    dtype: torch.dtype,
    private: Sequence[str],
    options: Options,
) -> Prepared:
    """See :func:`condu.checkpoint.unify`."""
    world = World.current()
    with ExitStack() as held:
        with world.step() as step:
            if not isinstance(tasks, Mapping) or not tasks:
                raise ValueError("tasks: there is no fine-tuned model to unify")
            for task in tasks:
                check_task_name(task)
            check_state_dtype(dtype)
            folder = _new_folder(out, base, *tasks.values())
            start = opened(held, base, options, folder)
            spec = describe(start, private)
            names = [entry.name for entry in spec.tensors]
            matched = []
            for number, (task, where) in enumerate(tasks.items()):
                source = opened(held, where, options, folder, start)
                spec, found = match(spec, task, source, start, names, options, settled=number > 0)
                matched.append(found)
            models = Models(spec, start, names, matched)
            fusion = Unifying(list(tasks), models, device_of(options))
            step.claims["the command"] = identity = identity_of(
                "unify", [start, *(m.source for m in matched)], [*tasks], options, dtype=str(dtype)
            ) | {"rule": asdict(rule), "private": list(private)}
        job = StateJob(spec, fusion, rule, dtype)
        commit = Commit(job, {}, os.fspath(base), dict(zip(tasks, matched, strict=True)))
        other = torch.bfloat16 if dtype == torch.float32 else torch.float32
        return Prepared(
            job,
            folder,
            identity,
            left_over,
            commit,
            world,
            options,
            sources=[start, *(m.source for m in matched)],
            other_dtype=(other, job.bytes_with(other)),
            held=held.pop_all(),
        )


def prepare_absorb(
    state: PathLike,
    task: str,
    finetuned: PathLike,
    out: PathLike | None,
    *,
    base: PathLike,
    options: Options,
) -> Prepared:
    """See :func:`condu.checkpoint.absorb`."""
    world = World.current()
    with ExitStack() as held:
        with world.step() as step:
            place = path_of("state", state)
            in_place = out is None or _same(place, path_of("out", out))
            folder = place if out is None or in_place else _new_folder(out, base, finetuned)
            old = held.enter_context(StateFiles(place))
            if check_task_name(task) in (entry.name for entry in old.manifest.tasks):
                raise ValueError(
                    f"task {task!r} is already in the state; drop it first to replace it"
                )
            start = opened(held, base, options, folder)
            source = opened(held, finetuned, options, folder, start)
            spec = logical(old.manifest.spec)
            names = find_base(spec, start)
            spec, found = match(
                spec, task, source, start, names, options, settled=bool(old.manifest.tasks)
            )
            fusion = Absorbing(old, task, Models(spec, start, names, [found]), device_of(options))
            step.claims["the command"] = identity = identity_of(
                "absorb", [start, source], [task], options, states=[old]
            )
        manifest = old.manifest
        known = manifest.base_fingerprints

        def expect(name: str, digits: str) -> None:
            if known.get(name, digits) != digits:
                raise ValueError(
                    f"{start.where}, tensor {name!r}: differs from the base model that the state "
                    "was made over"
                )

        job = StateJob(spec, fusion, manifest.rule, manifest.dtype, expect)
        base_name = manifest.base_name or os.fspath(base)
        commit = Commit(job, known, base_name, {task: found}, [old])
        stale = Unchanged(old) if in_place else left_over
        return Prepared(
            job,
            folder,
            identity,
            stale,
            commit,
            world,
            options,
            sources=[start, source],
            states=[old],
            held=held.pop_all(),
        )


def prepare_merge(a: PathLike, b: PathLike, out: PathLike, *, options: Options) -> Prepared:
    """See :func:`condu.checkpoint.merge`."""
    world = World.current()
    with ExitStack() as held:
        with world.step() as step:
            folder = _new_folder(out)
            states = [held.enter_context(StateFiles(path_of("state", path))) for path in (a, b)]
            order = _mergeable(*(state.manifest for state in states))
            fusion = Merging(states[0], states[1], order, device_of(options))
            step.claims["the command"] = identity = identity_of(
                "merge", [], [], options, states=states
            )
        left, right = (state.manifest for state in states)
        job = StateJob(logical(left.spec), fusion, left.rule, left.dtype)
        prints = right.base_fingerprints | left.base_fingerprints
        commit = Commit(job, prints, left.base_name or right.base_name, {}, states)
        return Prepared(
            job,
            folder,
            identity,
            left_over,
            commit,
            world,
            options,
            states=states,
            held=held.pop_all(),
        )


# ---- checks -------------------------------------------------------------------------------------


def opened(
    held: ExitStack, where: PathLike, options: Options, folder: Path, base: Source | None = None
) -> Source:
    """A model, closed with ``held``; what has to be copied first goes beside ``folder``."""
    path_of("model", where)
    scratch = next(place for place in folder.resolve().parents if place.is_dir())
    source = open_source(where, base=base, allow_pickle=options.allow_pickle, scratch=scratch)
    held.callback(source.close)
    needed = resident() + source.largest_part
    if source.largest_part and needed > options.max_memory:
        raise ValueError(
            f"max_memory: {options.max_memory >> 20} MiB are too few for {where}, which has parts "
            f"of {source.largest_part >> 20} MiB that are read whole; this needs {needed >> 20} MiB"
        )
    return source


def device_of(options: Options) -> torch.device:
    return torch.device(options.device)


def _same(a: PathLike, b: PathLike) -> bool:
    return os.path.realpath(a) == os.path.realpath(b)


def path_of(what: str, given: PathLike) -> Path:
    """A path that a user gave; an empty one, as of a variable that is not set, is none.

    Raises:
        ValueError: it is empty.
    """
    if not os.fspath(given):
        raise ValueError(f"{what}: the path is empty")
    return Path(given)


def _new_folder(out: PathLike, *inputs: PathLike) -> Path:
    """Where a new state goes.

    Raises:
        ValueError: there is one, or a model, or another ``config.json``. NotADirectoryError: there
            is a file.
    """
    folder = path_of("out", out)
    if folder.exists() and not folder.is_dir():
        raise NotADirectoryError(f"{folder} is a file, not a folder for a state")
    for where in inputs:
        if _same(out, where):
            raise ValueError(f"{folder} is one of the models; name a new folder for the state")
    for file in folder.glob("[!.]*.safetensors"):
        if generation_of(file.name) is None:
            raise ValueError(
                f"{folder} holds a model ({file.name}); name a new folder for the state"
            )
    if (folder / CONFIG).exists():
        try:
            tasks = ", ".join(task.name for task in read_manifest(folder).tasks)
        except ValueError as error:
            raise ValueError(
                f"{folder} holds something else; name a new folder for the state ({error})"
            ) from None
        raise ValueError(f"{folder} already holds a state, of the tasks {tasks}")
    return folder


def _mergeable(a: Manifest, b: Manifest) -> list[int]:
    """For each tensor of ``a`` its position in ``b``.

    Raises:
        ValueError: tasks in common, or states of another rule, dtype, base model or set of tensors.
    """
    if common := {task.name for task in a.tasks} & {task.name for task in b.tasks}:
        raise ValueError(f"both states hold task {min(common)!r}; rename one")
    for what, ours, theirs in (
        ("rule", a.rule, b.rule),
        ("dtype", a.dtype, b.dtype),
        ("private patterns", a.spec.private, b.spec.private),
        ("tied tensors", dict(a.spec.aliases), dict(b.spec.aliases)),
    ):
        if ours != theirs:
            raise ValueError(f"the states differ in {what}: {ours} and {theirs}")
    positions = {entry.name: k for k, entry in enumerate(b.spec.tensors)}
    for entry in logical(a.spec).tensors:
        other = logical(b.spec).tensors[positions[entry.name]] if entry.name in positions else None
        if entry != other:
            raise ValueError(f"the states differ in a tensor: {entry} and {other}")
        known = a.base_fingerprints.get(entry.name)  # None: nobody recorded it
        if known and b.base_fingerprints.get(entry.name, known) != known:
            raise ValueError(f"the states are over different base models: {entry.name!r} differs")
    if len(positions) != len(a.spec.tensors):
        extra = min(positions.keys() - {entry.name for entry in a.spec.tensors})
        raise ValueError(f"the states differ in a tensor: only the second has {extra!r}")
    return [positions[entry.name] for entry in a.spec.tensors]


def identity_of(
    command: str,
    sources: Sequence[Source],
    tasks: Sequence[str],
    options: Options,
    *,
    states: Sequence[StateFiles] = (),
    **more: Any,
) -> dict[str, Any]:
    """What a state depends on: the command, its inputs, and the options that matter."""
    files = [file for source in sources for file in source.files]
    return {
        "command": command,
        "tasks": list(tasks),
        "inputs": seen(files),
        "states": [xxhash.xxh3_64_hexdigest(s.manifest.to_json().encode()) for s in states],
        "match_dtype": options.match_dtype,
        "on_mismatch": options.on_mismatch,
        "device": torch.device(options.device).type,
        **more,
    }
