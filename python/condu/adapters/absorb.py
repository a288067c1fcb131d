"""A saved adapter into a unified checkpoint."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from torch import Tensor

import condu_ext as cx
from condu.adapters.folder import PREFIX, AdapterFolder
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
            that :class:`AdapterFolder` or the space cannot take. The checkpoint is as it was.
    """
    path = Path(state)
    folder = AdapterFolder.read(adapter)
    start = None if init is None else AdapterFolder.read(init)
    with _alone_beside(path):
        return _absorb(path, folder, start, task)


def _absorb(
    path: Path, folder: AdapterFolder, start: AdapterFolder | None, task: str
) -> UnifiedDelta:
    old = UnifiedDelta.load(path) if (path / "config.json").exists() else None
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
    _check_alike(folder, model, before_name, before)
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
    new = cx.absorb(old, task, model, None if start is None else start.tensors)
    new.save(path)
    return new


@contextmanager
def _alone_beside(path: Path) -> Iterator[None]:
    """Others that absorb into a checkpoint beside this one wait: between reading a state and
    writing the next, a task of theirs would be lost.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(path.parent, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


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


def _check_alike(
    folder: AdapterFolder,
    model: Mapping[str, Tensor],
    other: str,
    tensors: Mapping[str, Tensor],
) -> None:
    ours, theirs = _layers(model), _layers(tensors)
    if ours != theirs:
        layer = min(ours ^ theirs)
        having, lacking = (folder.path, other) if layer in ours else (other, folder.path)
        raise ValueError(f"{having} has layer {layer!r}, {lacking} does not: other target_modules")
    for name, tensor in tensors.items():
        if name in model and model[name].shape != tensor.shape:
            raise ValueError(
                f"{folder.path}, tensor {name!r}: shape {tuple(model[name].shape)}, but in {other}"
                f" {tuple(tensor.shape)}: another rank, or another base model"
            )


def _layers(names: Iterable[str]) -> set[str]:
    return {name.partition(".lora_")[0].removeprefix(PREFIX) for name in names}
