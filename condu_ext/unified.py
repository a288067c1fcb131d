"""``UnifiedDelta``: one unified delta model and a task trigger for each task.

A trigger is a 1-bit mask and a rescaler λ; the decoupled delta of task i is λ_i · M_i ⊙ u. The
state of T tasks takes 4 (fp32) or 2 (bf16) bytes and T bits a parameter. How it is laid out in
memory is private to this package (:mod:`condu_ext.layout`).
"""

from __future__ import annotations

import os
import threading
from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor

from condu_ext import views
from condu_ext._modes import without_autograd
from condu_ext.collective import Step
from condu_ext.fingerprint import model_fingerprints
from condu_ext.inputs import Model, describe
from condu_ext.layout import Arena, ModelSpec, empty_arena, group_by_device
from condu_ext.rule import FusionRule
from condu_ext.sharding import local_part, mesh_of
from condu_ext.transfer import rearranged

STATE_DTYPES = (torch.float32, torch.bfloat16)


def check_task_name(task: object) -> str:
    """A task's name: any non-empty string."""
    if not isinstance(task, str) or not task:
        raise ValueError(f"a task's name is a non-empty string, not {task!r}")
    return task


def check_state_dtype(dtype: torch.dtype) -> None:
    """Refuses dtypes that a unified delta cannot be stored in."""
    if dtype not in STATE_DTYPES:
        raise ValueError(
            f"state dtype {dtype}: use torch.float32 or torch.bfloat16 "
            "(small deltas underflow in float16)"
        )


class UnifiedDelta:
    """The unified delta of a sequence of tasks; made by :func:`unify`, :func:`absorb` or
    :meth:`empty`. A value: functions without a trailing underscore return a new state that shares
    no memory with the old one that anything writes.

    Attributes:
        rule: the :class:`FusionRule` it was made with.
        dtype: torch.float32 or torch.bfloat16.
        spec: the fused tensors' names and shapes, ties, and private patterns.
        lock: held by everything that writes or reads a consistent whole.
        base_name: name of the base model, as given to :meth:`record_base`.
        base_fingerprints: per fused tensor the xxh3 of the base's bytes, as hexadecimal digits.
    """

    def __init__(
        self,
        spec: ModelSpec,
        arenas: Sequence[Arena],
        *,
        tasks: Sequence[str] = (),
        rule: FusionRule,
        dtype: torch.dtype,
        private: Mapping[str, Mapping[str, Tensor]] | None = None,
    ) -> None:
        self.spec = spec
        self.arenas = list(arenas)
        self.rule = rule
        self.dtype = dtype
        self.lock = threading.RLock()
        self.base_name: str | None = None
        self.base_fingerprints: dict[str, str] = {}
        self._tasks = list(tasks)
        self._private = {task: dict((private or {}).get(task, {})) for task in tasks}
        self._damage: str | None = None

    @classmethod
    @without_autograd
    def empty(
        cls,
        pretrained: Model,
        *,
        rule: FusionRule | None = None,
        dtype: torch.dtype = torch.float32,
        private: Iterable[str] = (),
    ) -> UnifiedDelta:
        """A state without tasks over a base model: the start of a sequence.

        Args:
            pretrained: θ_0 by name; only names, shapes, devices and ties are read.
            private: fnmatch patterns of tensors to store whole for each task (heads, BatchNorm
                statistics).

        Raises:
            TypeError, ValueError: see :func:`condu_ext.inputs.describe`; a state dtype other than
                float32 and bfloat16.
        """
        mesh, rule = mesh_of(pretrained), rule or FusionRule()
        with Step(mesh) as step:
            check_state_dtype(dtype)
            spec = describe("pretrained", pretrained, private)
            step.mine = spec.aliases
        with Step(mesh) as agreed:
            spec = spec.with_ties(step.all)
            devices = [local_part(pretrained[entry.name]).device for entry in spec.tensors]
            groups = group_by_device(devices)
            agreed.claims |= spec.claims() | {
                "the rule": rule,
                "the state's dtype": dtype,
                "which tensors share a device": list(groups.values()),
            }
        arenas = [
            empty_arena(index, [spec.tensors[k].local_numel for k in index], dtype, device)
            for device, index in groups.items()
        ]
        return cls(spec, arenas, rule=rule, dtype=dtype)

    # ---- what a user reads ---------------------------------------------------------------------

    @property
    def tasks(self) -> tuple[str, ...]:
        """Names of the tasks, in the order in which they joined."""
        return tuple(self._tasks)

    @property
    def delta(self) -> dict[str, Tensor]:
        """The unified delta by tensor name, tied names included: views of the state's memory.

        Of a part that is kept in host memory under a mesh of GPUs it is a copy on the GPU, for
        torch puts a DTensor where its mesh is.
        """
        with self.lock:
            self.check_whole()
            return views.unified_delta(self.spec, self.arenas)

    def mask(self, task: str) -> dict[str, Tensor]:
        """A task's mask by tensor name, bool, in the tensor's shape; sharded as the tensor is."""
        with self.lock:
            return views.masks(self.spec, self.arenas, self.position(task))

    def packed_mask(self, task: str) -> dict[str, Tensor]:
        """A task's mask by tensor name, uint8 [ceil(numel / 8)], as ``numpy.packbits`` with
        ``bitorder="little"`` of the flattened mask; bits past the end are 0.

        Raises:
            TypeError: a sharded tensor, whose part need not end with a byte of the whole mask.
        """
        for entry in self.spec.tensors:
            if entry.shard is not None:
                raise TypeError(
                    f"packed_mask, tensor {entry.name!r}: is sharded ({entry.shard}), and its part "
                    "need not fill bytes; use mask()"
                )
        with self.lock:
            return views.packed_masks(self.spec, self.arenas, self.position(task))

    def rescaler(self, task: str) -> float | dict[str, float]:
        """λ of a task; with ``rescale="per_tensor"`` λ by tensor name. Synchronises a GPU."""
        with self.lock:
            row = self.position(task)
            table = views.by_name(
                self.spec, self.arenas, lambda arena, entry, part, k: float(arena.rescaler[row, k])
            )
        return table if self.rule.rescale == "per_tensor" else next(iter(table.values()))

    def private(self, task: str) -> dict[str, Tensor]:
        """A task's private tensors by name: copies."""
        self.position(task)
        return {name: tensor.clone() for name, tensor in self._private[task].items()}

    @property
    def nbytes(self) -> int:
        """Bytes of the state, of a sharded one those of this process: unified delta, masks, sums,
        private tensors."""
        private = [local_part(t) for tensors in self._private.values() for t in tensors.values()]
        return sum(a.nbytes for a in self.arenas) + sum(
            t.numel() * t.element_size() for t in private
        )

    def __repr__(self) -> str:
        numel = sum(entry.numel for entry in self.spec.tensors)
        mesh = self.spec.mesh
        spread = "" if mesh is None else f" here, over {mesh.size()} processes"
        return (
            f"UnifiedDelta({len(self._tasks)} tasks, {len(self.spec.tensors)} tensors, "
            f"{numel:,} parameters, {self.dtype}, {self.nbytes / 2**20:.1f} MiB{spread})"
        )

    # ---- what a user changes -------------------------------------------------------------------

    @without_autograd
    def drop(self, task: str) -> None:
        """Forget a task's trigger. The unified delta does not change: other tasks keep theirs."""
        with self.lock:
            position = self.position(task)
            rest = [t for t in range(len(self._tasks)) if t != position]
            for arena in self.arenas:
                arena.num, arena.den = arena.num[rest], arena.den[rest]
                arena.rescaler = arena.rescaler[rest]
                del arena.planes[position]
            del self._tasks[position], self._private[task]

    def rename(self, task: str, name: str) -> None:
        """Give a task another name.

        Raises:
            KeyError: no such task. ValueError: the new name is in use.
        """
        with self.lock:
            position = self.position(task)
            self.check_new_task(name)
            self._tasks[position] = name
            self._private[name] = self._private.pop(task)

    def record_base(self, pretrained: Model, name: str | None = None) -> None:
        """Remember a fingerprint of every fused tensor of θ_0, to recognise it later. Collective
        for a sharded state.

        Raises:
            KeyError, ValueError, TypeError: names or shapes are not those of the state, or plain or
                replicated tensors differ between processes.
        """
        with self.lock:
            self.base_fingerprints = model_fingerprints(self.spec, pretrained)
            self.base_name = name

    def verify_base(self, pretrained: Model) -> None:
        """Check that this is the base model that was recorded. Collective for a sharded state.

        Raises:
            ValueError: nothing was recorded, or the first tensor that differs.
        """
        if not self.base_fingerprints:
            raise ValueError("the state has no fingerprint of its base model: call record_base")
        for tensor, digits in model_fingerprints(self.spec, pretrained).items():
            if digits != self.base_fingerprints[tensor]:
                named = f" ({self.base_name})" if self.base_name else ""
                raise ValueError(
                    f"pretrained, tensor {tensor!r}: differs from the base model{named} that "
                    "the state was made over"
                )

    @without_autograd
    def to(self, device: torch.device | str) -> UnifiedDelta:
        """A copy of the state in one arena on a device."""
        device = torch.device(device)
        with self.lock:
            self.check_whole()
            orders = [entry.order for entry in self.spec.tensors]
            _, arenas = rearranged(self.spec, self.arenas, [device] * len(orders), orders)
            private = {
                task: {name: tensor.to(device, copy=True) for name, tensor in tensors.items()}
                for task, tensors in self._private.items()
            }
            return self.successor(arenas, tasks=self._tasks, private=private)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the state as a unified checkpoint; see :func:`condu_ext.storage.save`. Collective
        for a sharded state."""
        from condu_ext import storage

        storage.save(self, path)

    @classmethod
    def load(cls, path: str | os.PathLike[str], *, like: Model | None = None) -> UnifiedDelta:
        """Read a unified checkpoint, placed as the tensors of ``like`` are; see
        :func:`condu_ext.loading.load`."""
        from condu_ext import loading

        return loading.load(path, like=like)

    # ---- what the package uses -----------------------------------------------------------------

    def position(self, task: str) -> int:
        """Index of a task. Raises KeyError naming it and the tasks that there are."""
        self.check_whole()
        if task not in self._tasks:
            raise KeyError(f"unknown task {task!r}; the state holds {', '.join(self._tasks)}")
        return self._tasks.index(task)

    def check_new_task(self, task: str) -> None:
        """Raises ValueError if a name is not usable for one more task."""
        self.check_whole()
        if check_task_name(task) in self._tasks:
            raise ValueError(f"task {task!r} is already in the state; drop it first to replace it")

    def check_whole(self) -> None:
        """Raises RuntimeError after an unchecked absorb_ that met bad input."""
        if self._damage:
            raise RuntimeError(self._damage)

    def mark_damaged(self, reason: str | None) -> None:
        """Make every later use raise ``reason``; None takes that back."""
        self._damage = reason

    def private_of(self, task: str) -> dict[str, Tensor]:
        """A task's private tensors themselves: never written, so states may share them."""
        return self._private[task]

    def add_task(self, task: str, private: dict[str, Tensor]) -> None:
        """Record a task that the arenas already hold."""
        self._tasks.append(task)
        self._private[task] = private

    def successor(
        self,
        arenas: Sequence[Arena],
        *,
        tasks: Sequence[str],
        private: Mapping[str, Mapping[str, Tensor]],
        spec: ModelSpec | None = None,
    ) -> UnifiedDelta:
        """A new state over the same base with other arenas and tasks."""
        state = UnifiedDelta(
            spec or self.spec,
            arenas,
            tasks=tasks,
            rule=self.rule,
            dtype=self.dtype,
            private=private,
        )
        state.base_name = self.base_name
        state.base_fingerprints = dict(self.base_fingerprints)
        return state

    def devices(self) -> list[torch.device]:
        """Device of each fused tensor's part."""
        found = {k: arena.device for arena in self.arenas for k in arena.index}
        return [found[k] for k in range(len(self.spec.tensors))]

    def alive(self) -> list[bool]:
        """Which tasks still have a rescaler above 0."""
        return [
            any(bool((arena.rescaler[t] > 0).any()) for arena in self.arenas)
            for t in range(len(self._tasks))
        ]
