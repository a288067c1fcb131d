"""What is in a unified checkpoint: tasks, rescalers, how dense the masks are, and how far the tasks
agree. Masks are counted by ranges, in memory that does not depend on the size of the model."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from condu.checkpoint.state_files import StateFiles
from condu_ext.contents import until_settled
from condu_ext.layout import ModelSpec
from condu_ext.manifest import FORMAT_VERSION, Manifest, TaskEntry, read_manifest
from condu_ext.rule import FusionRule

_CACHED = 1 << 20  # bytes of masks that a thread counts at a time: they stay in its L2 cache


@dataclass(frozen=True)
class GroupInspection:
    """Tensors that differ in nothing but the numbers in their names and the names' last part.

    Attributes:
        name: such as ``vision.layers.*.attn``.
        parameters: elements of its tensors.
        zero_sums: exact ties in them, as in :class:`Inspection`.
    """

    name: str
    parameters: int
    zero_sums: int | None


@dataclass(frozen=True)
class TaskInspection:
    """A task's trigger and what it keeps for itself.

    Attributes:
        name: of the task.
        rescaler: smallest and largest λ of the tensors that the task moved; equal, but for the
            rule ``per_tensor``. (0, 0) for a task that moved none, or was outvoted everywhere.
        density: share of mask bits that are set; None in a state without parameters.
        group_density: the same in each group, in the order of the groups.
        private_tensors, private_bytes: tensors stored whole.
    """

    name: str
    rescaler: tuple[float, float]
    density: float | None
    group_density: list[float | None]
    private_tensors: int
    private_bytes: int


@dataclass(frozen=True)
class Sizes:
    """Bytes of the data files by kind, and of all of them."""

    unified: int
    triggers: int
    private: int
    total: int


@dataclass(frozen=True)
class Inspection:
    """What :func:`inspect` finds.

    Attributes:
        path: the folder.
        base_name: of the model that the state is over, if it was recorded.
        rule: by which the tasks were fused.
        dtype: of the unified delta, ``float32`` or ``bfloat16``.
        generation: counts the states that were written to the folder.
        format_version, library_version: of the writer.
        tensors, parameters: that are fused.
        sizes: in bytes.
        bytes_per_parameter: of all files; None in a state without parameters.
        zero_sums: parameters whose deltas added up to exactly 0 in the last fusion though some
            model had moved, so that ``rule.zero_sum`` decided; None if they were not counted, as in
            states that were fused in memory.
        groups: of the tensors, in the model's order.
        tasks: in the order in which they joined.
        agreement: for every two tasks |M_i ∧ M_j| / |M_i ∨ M_j|; None where both masks are empty.
    """

    path: str
    base_name: str | None
    rule: FusionRule
    dtype: str
    generation: int
    format_version: int
    library_version: str
    tensors: int
    parameters: int
    sizes: Sizes
    bytes_per_parameter: float | None
    zero_sums: int | None
    groups: list[GroupInspection]
    tasks: list[TaskInspection]
    agreement: list[list[float | None]]

    def as_dict(self) -> dict[str, Any]:
        """All of it as JSON takes it."""
        return asdict(self)


def inspect(path: str | os.PathLike[str]) -> Inspection:
    """Look into a unified checkpoint. Reads all masks, and nothing of the unified delta; checksums
    are not checked (:func:`condu.checkpoint.verify`).

    Raises:
        FileNotFoundError: no checkpoint there, or one of its files is missing.
        OSError: a file cannot be read.
        CheckpointError: it is not what its ``config.json`` says; the message names the file.
    """
    return until_settled(lambda: read_manifest(Path(path)), lambda _: _inspect(path))


def _inspect(path: str | os.PathLike[str]) -> Inspection:
    with StateFiles(path) as files:
        set_bits, common = count_bits(files)
        private = [list(files.private(t).values()) for t in range(len(files.manifest.tasks))]
    manifest = files.manifest
    numels = [entry.numel for entry in manifest.spec.tensors]
    members = _groups(manifest.spec)
    tasks = [
        TaskInspection(
            name=task.name,
            rescaler=_range_of_rescalers(task),
            density=_share(bits.sum(), sum(numels)),
            group_density=[
                _share(bits[group].sum(), sum(numels[k] for k in group))
                for group in members.values()
            ],
            private_tensors=len(tensors),
            private_bytes=sum(tensor.nbytes for tensor in tensors),
        )
        for task, bits, tensors in zip(manifest.tasks, set_bits, private, strict=True)
    ]
    own = np.diagonal(common)
    either = own[:, None] + own[None, :] - common
    sizes = _sizes(manifest)
    return Inspection(
        path=os.fspath(path),
        base_name=manifest.base_name,
        rule=manifest.rule,
        dtype=str(manifest.dtype).removeprefix("torch."),
        generation=manifest.generation,
        format_version=FORMAT_VERSION,
        library_version=manifest.library_version,
        tensors=len(numels),
        parameters=sum(numels),
        sizes=sizes,
        bytes_per_parameter=_share(sizes.total, sum(numels)),
        zero_sums=_sum_of(manifest.zero_sums, range(len(numels))),
        groups=[
            GroupInspection(name, sum(numels[k] for k in group), _sum_of(manifest.zero_sums, group))
            for name, group in members.items()
        ],
        tasks=tasks,
        agreement=[
            [_share(both, any_of) for both, any_of in zip(*rows, strict=True)]
            for rows in zip(common.tolist(), either.tolist(), strict=True)
        ],
    )


def _share(part: float, whole: int) -> float | None:
    return float(part / whole) if whole else None


def _sum_of(counts: Sequence[int] | None, which: Sequence[int]) -> int | None:
    return None if counts is None else sum(counts[k] for k in which)


def _range_of_rescalers(task: TaskEntry) -> tuple[float, float]:
    moved = [value for value, num in zip(task.rescaler, task.num, strict=True) if num > 0]
    return (min(moved), max(moved)) if moved else (0.0, 0.0)


def _sizes(manifest: Manifest) -> Sizes:
    kinds = {"unified": 0, "triggers": 0, "private": 0}
    for name, listed in manifest.files.items():
        kinds[name.partition("-")[0]] += listed["size"]
    return Sizes(**kinds, total=sum(kinds.values()))


def group_of(name: str) -> str:
    """The layer group of a tensor: ``a.0.b.weight`` and ``a.1.b.bias`` are both of ``a.*.b``."""
    parts = ["*" if part.isdigit() else part for part in name.split(".")]
    return ".".join(parts[:-1] or parts)


def _groups(spec: ModelSpec) -> dict[str, list[int]]:
    members: dict[str, list[int]] = {}
    for k, entry in enumerate(spec.tensors):
        members.setdefault(group_of(entry.name), []).append(k)
    return members


# ---- counting ------------------------------------------------------------------------------------


def count_bits(files: StateFiles) -> tuple[np.ndarray, np.ndarray]:
    """Of all masks the bits that are set, int64 [tasks, tensors], and those that two tasks have in
    common, int64 [tasks, tasks]; on the diagonal those of the task."""
    tasks, tensors = len(files.manifest.tasks), len(files.manifest.spec.tensors)
    step = 64 * max(1, _CACHED // (8 * max(1, tasks)))
    ranges = list(_ranges(files.manifest.spec, step)) if tasks else []
    threads = os.cpu_count() or 1

    def count(mine: Sequence[tuple[int, int, int]]) -> tuple[np.ndarray, np.ndarray]:
        set_bits = np.zeros((tasks, tensors), np.int64)
        common = np.zeros((tasks, tasks), np.int64)
        block = np.zeros((tasks, step // 64), np.uint64)
        scratch = block.copy(), block.astype(np.uint8)
        for tensor, start, stop in mine:
            words = (stop - start + 63) // 64
            _read_block(files, tensor, start, stop, block[:, :words])
            found = _common_bits(block[:, :words], *scratch)
            common += found
            set_bits[:, tensor] += np.diagonal(found)
        return set_bits, common

    with ThreadPoolExecutor(threads) as pool:
        counts = list(pool.map(count, [ranges[k::threads] for k in range(threads)]))
    set_bits = np.sum([bits for bits, _ in counts], axis=0)
    common = np.sum([both for _, both in counts], axis=0)
    return set_bits, common + np.triu(common, 1).T


def _ranges(spec: ModelSpec, step: int) -> Iterator[tuple[int, int, int]]:
    for k, entry in enumerate(spec.tensors):
        for start in range(0, entry.numel, step):
            yield k, start, min(entry.numel, start + step)


def _read_block(files: StateFiles, tensor: int, start: int, stop: int, block: np.ndarray) -> None:
    """Mask bits of all tasks into uint64 [tasks, words]; bits past ``stop`` become 0."""
    size = (stop - start + 7) // 8
    rows = block.view(np.uint8)
    rows[:, size:] = 0
    for task in range(len(block)):
        files.read_bits(task, tensor, start, stop, torch.from_numpy(rows[task, :size]))
    if stop % 8:
        rows[:, size - 1] &= (1 << stop % 8) - 1


def _common_bits(block: np.ndarray, both: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """Bits that every two rows of uint64 [tasks, words] have in common, above the diagonal and on
    it; ``both`` (uint64) and ``counts`` (uint8) are scratch memory of at least its shape."""
    tasks, words = block.shape
    common = np.zeros((tasks, tasks), np.int64)
    for task in range(tasks):
        later = tasks - task
        pairs = np.bitwise_and(block[task], block[task:], out=both[:later, :words])
        bits = np.bitwise_count(pairs, out=counts[:later, :words])
        common[task, task:] = bits.sum(1, dtype=np.uint32)
    return common
