"""Fuse checkpoints larger than memory, and larger than one machine.

>>> from condu import checkpoint
>>> checkpoint.unify("base", {"aircraft": "ft1", "dtd": "ft2"}, "state")
>>> checkpoint.absorb("state", "food", "ft3", base="base")
>>> checkpoint.extract("state", "dtd", "dtd-model", base="base")

A checkpoint is a safetensors file, a Hugging Face folder, a folder that PEFT saved a LoRA adapter
in, with ``allow_pickle`` a .bin or .pt file or a distributed checkpoint (DCP), or the id of any of
these on the Hugging Face hub. Only ranges of it are in memory at a time (``Options.max_memory``).

Where the default process group has several processes, each call is collective: all make it with
the same arguments, on folders that all of them see, and share the work; the result is the same,
byte for byte. An error on one process is raised on all.

A run that was killed leaves its target as it was, and the same call goes on from what was finished.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TypeVar

import torch

from condu.checkpoint.costs import Costs
from condu.checkpoint.editing import drop, rename
from condu.checkpoint.experts import prepare_extract
from condu.checkpoint.inspecting import Inspection, inspect
from condu.checkpoint.options import Options
from condu.checkpoint.states import PathLike, prepare_absorb, prepare_merge, prepare_unify
from condu.checkpoint.verifying import verify
from condu_ext.rule import FusionRule

T = TypeVar("T")

__all__ = [
    "Costs",
    "Inspection",
    "Options",
    "absorb",
    "drop",
    "extract",
    "inspect",
    "merge",
    "rename",
    "unify",
    "verify",
]


def unify(
    base: PathLike,
    tasks: Mapping[str, PathLike],
    out: PathLike,
    *,
    rule: FusionRule | None = None,
    dtype: torch.dtype = torch.float32,
    private: Iterable[str] = (),
    options: Options | None = None,
) -> Costs:
    """Fuse fine-tuned checkpoints of one base model into a new state (:func:`condu_ext.unify`).

    Args:
        base: the pretrained model.
        tasks: task name → fine-tuned checkpoint.
        out: folder of the new state.
        rule: ties and rescalers; default :class:`FusionRule` ().
        dtype: dtype of the unified delta, float32 or bfloat16.
        private: fnmatch patterns of tensors to store whole for each task.

    Returns:
        What it took.

    Raises:
        KeyError: a tensor is missing.
        TypeError: a tensor of a dtype that cannot be fused.
        ValueError: a damaged file, another shape, NaN or infinite values, a fine-tuned dtype
            narrower than the base's, too little memory, or ``out`` holds a state already.
        OSError: a file cannot be read, or the disk is full.
        RuntimeError: another process is writing there, or one of several failed.
        All name the file, the task or the tensor.
    """
    if not isinstance(tasks, Mapping):
        raise TypeError(f"tasks: expected a mapping of names to checkpoints, got {tasks!r:.80}")
    with prepare_unify(
        base,
        tasks,
        out,
        rule=_of_type("rule", rule, FusionRule),
        dtype=dtype,
        private=_patterns(private),
        options=_of_type("options", options, Options),
    ) as prepared:
        return prepared.run()


def absorb(
    state: PathLike,
    task: str,
    finetuned: PathLike,
    out: PathLike | None = None,
    *,
    base: PathLike,
    options: Options | None = None,
) -> Costs:
    """Absorb one more fine-tuned checkpoint into a state (:func:`condu_ext.absorb`).

    Args:
        state: folder of a unified checkpoint.
        out: folder of the new state; None replaces the old one, as one step.
        base: the pretrained model that the state was made over.

    Returns, Raises:
        As :func:`unify`. ValueError also for a task that the state holds, another base model (by
        its fingerprints), and a damaged state.
    """
    with prepare_absorb(
        state, task, finetuned, out, base=base, options=_of_type("options", options, Options)
    ) as prepared:
        return prepared.run()


def merge(a: PathLike, b: PathLike, out: PathLike, *, options: Options | None = None) -> Costs:
    """Join two states over one base model (:func:`condu_ext.merge`): a's tasks, then b's.

    Returns, Raises:
        As :func:`unify`. ValueError also for tasks in common and states that differ in rule, dtype,
        tensors or base model.
    """
    with prepare_merge(a, b, out, options=_of_type("options", options, Options)) as prepared:
        return prepared.run()


def extract(
    state: PathLike,
    task: str,
    out: PathLike,
    *,
    base: PathLike,
    format: str = "safetensors",
    options: Options | None = None,
) -> Costs:
    """Write a task's expert as a model of its own (:func:`condu_ext.decouple`).

    The folder has the base's files with the expert's weights, in the base's dtypes, and everything
    else that is in the base's folder: configuration, tokenizer, processor.

    Args:
        out: folder to make; of a base in one file also a name that ends with ``.safetensors``.
        format: ``"safetensors"``, or ``"dcp"`` for weights as a distributed checkpoint.

    Returns, Raises:
        As :func:`absorb`. KeyError also for an unknown task; ValueError for a folder that is not
        empty.
    """
    with prepare_extract(
        state, task, out, base=base, options=_of_type("options", options, Options), format=format
    ) as prepared:
        return prepared.run()


def _patterns(private: Iterable[str]) -> tuple[str, ...]:
    if isinstance(private, str):
        raise TypeError(f"private: expected a tuple of patterns, got the string {private!r}")
    patterns = tuple(private)
    for pattern in patterns:
        if not isinstance(pattern, str):
            raise TypeError(f"private: expected patterns as strings, got {pattern!r}")
    return patterns


def _of_type(name: str, given: object, kind: type[T]) -> T:
    """What was given, or the default where it is None."""
    if given is not None and not isinstance(given, kind):
        raise TypeError(f"{name}: expected {kind.__name__}, got {given!r}")
    return kind() if given is None else given
