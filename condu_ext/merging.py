"""Merge: two states over the same base model become one, as absorb does with a state of one task.

Arguments and errors are those of :mod:`condu_ext.fusion`.
"""

from __future__ import annotations

from dataclasses import replace

import torch

from condu_ext._dispatch import ZERO_SUM_CODES, kernels_for, tensor_names
from condu_ext._modes import without_autograd
from condu_ext.collective import Step
from condu_ext.layout import Arena
from condu_ext.rescale import apply_rescalers, check_finite, warn_of
from condu_ext.sums import SumStep
from condu_ext.transfer import rearranged
from condu_ext.unified import UnifiedDelta


@without_autograd
def merge(a: UnifiedDelta, b: UnifiedDelta, *, backend: str | None = None) -> UnifiedDelta:
    """Join two states over the same base model: a's tasks, then b's.

    Raises:
        ValueError: tasks in common, another rule, dtype, base model, set of tensors, device, or
            placement of shards.
    """
    first, second = sorted((a, b), key=id)  # one order, whoever merges what into what
    with first.lock, second.lock:
        tasks = [*a.tasks, *b.tasks]
        with Step(a.spec.mesh) as step:
            _check_mergeable(a, b)
            kernels = [kernels_for(backend, arena.device) for arena in a.arenas]
            step.claims["the tasks"] = tasks
        merged = []
        with SumStep(a.spec, tasks) as summing:
            orders = [entry.order for entry in a.spec.tensors]
            matching = b.arenas
            if orders != [entry.order for entry in b.spec.tensors]:
                _, matching = rearranged(b.spec, b.arenas, b.devices(), orders)
            for left, right, own in zip(a.arenas, matching, kernels, strict=True):
                u, planes, chunk_sums = own.merge(
                    left.u,
                    left.planes,
                    left.rescaler,
                    right.u,
                    right.planes,
                    right.rescaler,
                    list(left.numels),
                    ZERO_SUM_CODES[a.rule.zero_sum],
                )
                summing.add(left.index, chunk_sums)
                num = torch.cat([left.num, right.num])
                merged.append((left, u, list(planes), num))
        arenas = []
        for (left, u, planes, num), den in zip(merged, summing.sums(), strict=True):
            check_finite(den, tasks, tensor_names(a.spec, left))
            arenas.append(Arena(left.index, left.numels, u, planes, num, den, left.rescaler))
        warn_of(apply_rescalers(a.spec, arenas, a.rule, tasks, [*a.alive(), *b.alive()]))
        private = {t: a.private_of(t) for t in a.tasks} | {t: b.private_of(t) for t in b.tasks}
        result = a.successor(arenas, tasks=tasks, private=private)
        result.base_name = a.base_name or b.base_name
        result.base_fingerprints = b.base_fingerprints | a.base_fingerprints
        return result


def _check_mergeable(a: UnifiedDelta, b: UnifiedDelta) -> None:
    a.check_whole()
    b.check_whole()
    if common := set(a.tasks) & set(b.tasks):
        raise ValueError(f"both states hold task {min(common)!r}; rename one")
    for what, ours, theirs in (
        ("rule", a.rule, b.rule),
        ("dtype", a.dtype, b.dtype),
        ("private patterns", a.spec.private, b.spec.private),
        ("device mesh", a.spec.mesh, b.spec.mesh),
    ):
        if ours != theirs:
            raise ValueError(f"the states differ in {what}: {ours} and {theirs}")
    _check_same_tensors(a, b)


def _check_same_tensors(a: UnifiedDelta, b: UnifiedDelta) -> None:
    for left, right in zip(a.spec.tensors, b.spec.tensors, strict=False):
        if left != replace(right, order=left.order):
            raise ValueError(f"the states differ in a tensor: {left} and {right}")
    if len(a.spec.tensors) != len(b.spec.tensors) or a.spec.aliases != b.spec.aliases:
        raise ValueError("the states differ in their tensors or in which are tied")
    if a.devices() != b.devices():
        raise ValueError(
            f"the states are on {a.devices()[0]} and {b.devices()[0]}; use .to(device)"
        )
    for name, digits in a.base_fingerprints.items():
        if b.base_fingerprints.get(name, digits) != digits:
            raise ValueError(f"the states are over different base models: {name!r} differs")
