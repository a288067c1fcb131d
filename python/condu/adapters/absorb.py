"""A saved adapter into a unified checkpoint."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor

import condu_ext as cx
from condu.adapters.folder import AdapterFolder
from condu.adapters.likeness import check_alike
from condu.spaces import holds_factors
from condu_ext import UnifiedDelta


def absorb_adapter(
    state: str | os.PathLike[str],
    adapter: str | os.PathLike[str],
    task: str,
    *,
    init: str | os.PathLike[str] | None = None,
) -> UnifiedDelta:
    """Absorb an adapter that PEFT saved into a unified checkpoint, as one step on disk.

    PEFT saves neither an adapter's start nor its seed. So the state is one of products, ΔW = s·B·A,
    which need no common start, and no base model either. With ``init``, a folder saved before the
    training, it is one of factors.

    Args:
        state: folder of the checkpoint; made, if there is none.
        adapter: folder with ``adapter_config.json`` and ``adapter_model.safetensors``.

    Returns:
        The new state, as saved.

    Raises:
        FileNotFoundError: no adapter there.
        ValueError: the task is in the state already; the state is one of the other space, or over
            another base model or start; other target_modules, another rank or scale; an adapter
            that was not trained, or that :class:`AdapterFolder` or the space cannot take.
        TypeError: a tensor of a dtype that cannot be absorbed.
        RuntimeError: another process is absorbing into the checkpoint.
        In all cases the checkpoint is as it was.
    """
    path = Path(state)
    folder = AdapterFolder.read(adapter)
    start = None if init is None else AdapterFolder.read(init)
    new = None
    if not _is_state(path):  # asked before the first file is made, so that bad input makes none
        new = _absorbed(None, path, folder, start, task)
    with _lock_beside(path):
        if new is None or _is_state(path):
            new = _absorbed(UnifiedDelta.load(path), path, folder, start, task)
        new.save(path)
    return new


def _is_state(path: Path) -> bool:
    return (path / "config.json").exists()


def _absorbed(
    old: UnifiedDelta | None,
    path: Path,
    folder: AdapterFolder,
    start: AdapterFolder | None,
    task: str,
) -> UnifiedDelta:
    """The state at ``path`` with the task; ``old`` is what is there."""
    if old is not None:
        old.check_new_task(task)
        check_space(old, path, start)
    model: Mapping[str, Tensor]
    before: Mapping[str, Tensor]
    if start is None:
        model = folder.deltas()
        before = old.delta if old is not None else model
        before_name = os.fspath(path)
    else:
        model, before, before_name = folder.tensors, start.tensors, os.fspath(start.path)
    check_alike(os.fspath(folder.path), model, before_name, before)
    if start is not None and folder.scales() != start.scales():
        scales, others = folder.scales(), start.scales()
        weight = next(name for name in scales if scales[name] != others[name])
        raise ValueError(
            f"{folder.path}: scale {scales[weight]:g} of {weight!r}, in {start.path} it is"
            f" {others[weight]:g}"
        )
    base_name = folder.config.base_model_name_or_path or None
    if old is None:
        old = UnifiedDelta.empty(before)
        if start is not None:
            old.record_base(start.tensors)
        old.base_name = base_name
    elif start is not None:
        old.verify_base(start.tensors)
    if base_name and old.base_name and base_name != old.base_name:
        raise ValueError(
            f"{folder.path}: trained on {base_name!r}, but the state's base model is"
            f" {old.base_name!r}; if they are one, say so in its adapter_config.json"
        )
    _check_trained(folder, model, start)
    return cx.absorb(old, task, model, None if start is None else start.tensors)


def _check_trained(
    folder: AdapterFolder, model: Mapping[str, Tensor], start: AdapterFolder | None
) -> None:
    if start is None:
        if not any(delta.any() for delta in model.values()):
            raise ValueError(f"{folder.path} was not trained: B·A is zero in all layers")
    elif all(torch.equal(tensor, start.tensors[name]) for name, tensor in model.items()):
        raise ValueError(f"{folder.path} was not trained: all tensors are those of {start.path}")


@contextmanager
def _lock_beside(path: Path) -> Iterator[None]:
    """Others that absorb into this checkpoint are refused: between reading a state and writing
    the next, a task of theirs would be lost. The state's own lock is held while it is written only.
    """
    place = path.resolve()
    place.parent.mkdir(parents=True, exist_ok=True)
    file = place.with_name(f".{place.name}.lock")
    with open(file, "w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise RuntimeError(
                f"{file} is locked: another process is absorbing into {path}"
            ) from None
        yield


def check_space(state: UnifiedDelta, path: Path, start: AdapterFolder | None) -> None:
    """Refuses a start for a state of products, and none for one of factors.

    Raises:
        ValueError: naming the option to give or to leave out.
    """
    factors = holds_factors(state.delta)
    if factors and start is None:
        raise ValueError(
            f"{path} is a state of LoRA factors: init must name the adapter that was saved before"
            " training, their common start"
        )
    if not factors and start is not None:
        raise ValueError(f"{path} is a state of weights, not of LoRA factors: leave init out")
