"""Unify, absorb, merge: models by name in, states out.

Each function checks names, shapes, dtypes, devices and ties first, then makes one call to the
kernels for each device, then forms the rescalers. Source: ConDU, arXiv 2503.10705; θ is a
fine-tuned model, θ_0 the pretrained one, d = θ − θ_0 in fp32.

Common arguments:
    pretrained: θ_0 by name, or None where the models already are deltas.
    missing: ``"error"``, or ``"unchanged"`` to take a missing tensor as not fine-tuned.
    match_dtype: round θ_0 to the fine-tuned model's 16-bit dtype first where that is narrower;
        decoupling then starts from the rounded θ_0.
    backend: None chooses by device; ``"cpu"``, ``"cuda"``, or ``"reference"`` (plain PyTorch). On a
        GPU for which no kernels were compiled None means ``"reference"``.

Common errors: ``KeyError`` for a missing tensor or an unknown task, ``TypeError`` for tensors that
cannot be fused (float64, quantised, sharded), ``ValueError`` for everything else; all name the task
and the tensor, and leave every argument as it was.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace

import torch
from torch import Tensor

from condu_ext import _native
from condu_ext._dispatch import (
    ZERO_SUM_CODES,
    Sources,
    kernels_for,
    read_base,
    tensor_names,
)
from condu_ext._modes import without_autograd
from condu_ext.inputs import (
    Model,
    check_devices,
    check_fixed,
    check_private,
    describe,
    private_tensors,
    resolve,
    with_rounding,
)
from condu_ext.layout import Arena, ModelSpec, group_by_device
from condu_ext.rescale import apply_rescalers, check_finite, warn_of
from condu_ext.rule import FusionRule
from condu_ext.transfer import rearranged
from condu_ext.unified import UnifiedDelta, check_state_dtype, check_task_name


@without_autograd
def unify(
    models: Mapping[str, Model],
    pretrained: Model | None,
    *,
    rule: FusionRule | None = None,
    dtype: torch.dtype = torch.float32,
    private: Iterable[str] = (),
    missing: str = "error",
    match_dtype: bool = False,
    backend: str | None = None,
) -> UnifiedDelta:
    """Fuse fine-tuned models of one pretrained model into a new state.

    Args:
        models: task name → fine-tuned model by tensor name (or delta, if ``pretrained`` is None).
        rule: ties and rescalers; default :class:`FusionRule` ().
        dtype: dtype of the unified delta, float32 or bfloat16.
        private: fnmatch patterns of tensors to store whole for each task.

    Returns:
        A state with the tasks in the order of ``models``.
    """
    if not isinstance(models, Mapping):
        raise TypeError(
            f"models: expected a mapping from task names to models, got {type(models).__name__}"
        )
    if not models:
        raise ValueError("models: there is no model to unify")
    check_state_dtype(dtype)
    rule = rule or FusionRule()
    tasks = [check_task_name(task) for task in models]
    first = next(iter(models.values()))
    private = private if isinstance(private, str) else tuple(private)
    template = pretrained if pretrained is not None else first
    spec = describe(
        "pretrained" if pretrained is not None else f"task {tasks[0]!r}", template, private
    )
    base = read_base(spec, pretrained)
    devices = [template[entry.name].device for entry in spec.tensors]

    resolved: list[list[Tensor | None]] = []
    for k, (task, model) in enumerate(models.items()):
        who = f"task {task!r}"
        tensors = resolve(spec, who, model, missing)
        check_private(spec, who, model, missing)
        check_fixed(spec, who, model, pretrained)
        check_devices(spec, who, tensors, devices)
        spec = with_rounding(spec, who, tensors, base, match_dtype=match_dtype, settled=k > 0)
        resolved.append(tensors)

    arenas = []
    for device, index in group_by_device(devices).items():
        kernels = kernels_for(backend, device)
        start = Sources(spec, base)
        theta_0 = start.flat(index, None, device) if pretrained is not None else []
        fallback = start if pretrained is not None else None
        flat = [
            t for tensors in resolved for t in Sources(spec, tensors).flat(index, fallback, device)
        ]
        numels = [spec.tensors[k].numel for k in index]
        u, planes, chunk_sums = kernels.unify(
            flat, theta_0, len(tasks), ZERO_SUM_CODES[rule.zero_sum], dtype, start.via(index)
        )
        sums = _native.add_chunks(numels, chunk_sums)
        num, den = sums[: len(tasks)], sums[len(tasks) :]
        arena = Arena(
            tuple(index), tuple(numels), u, list(planes), num, den, torch.zeros(num.shape)
        )
        check_finite(num, tasks, tensor_names(spec, arena))
        check_finite(den, tasks, tensor_names(spec, arena))
        arenas.append(arena)
    warn_of(apply_rescalers(spec, arenas, rule, tasks, [True] * len(tasks)))
    kept = {task: private_tensors(spec, model) for task, model in models.items()}
    return UnifiedDelta(spec, arenas, tasks=tasks, rule=rule, dtype=dtype, private=kept)


class _Newcomer:
    """A model that is about to be absorbed, checked against a state."""

    def __init__(
        self,
        state: UnifiedDelta,
        task: str,
        finetuned: Model,
        pretrained: Model | None,
        missing: str,
        match_dtype: bool,
    ) -> None:
        state.check_new_task(task)
        who = f"task {task!r}"
        base = read_base(state.spec, pretrained)
        tensors = resolve(state.spec, who, finetuned, missing)
        check_private(state.spec, who, finetuned, missing)
        check_fixed(state.spec, who, finetuned, pretrained)
        devices = state.devices()
        check_devices(state.spec, who, tensors, devices)
        check_devices(state.spec, "pretrained", base, devices)
        self.spec = with_rounding(
            state.spec, who, tensors, base, match_dtype=match_dtype, settled=bool(state.tasks)
        )
        self.model = Sources(self.spec, tensors)
        self.base = Sources(self.spec, base) if pretrained is not None else None
        self.private = private_tensors(state.spec, finetuned)

    def inputs(self, arena: Arena) -> tuple[list[Tensor], list[Tensor], list[int]]:
        """Arguments ``model``, ``base`` and ``via`` of the operators for one arena."""
        device = arena.device
        base = self.base.flat(arena.index, None, device) if self.base else []
        return self.model.flat(arena.index, self.base, device), base, self.model.via(arena.index)


def _absorbed_sums(
    arena: Arena, task: str, spec: ModelSpec, chunk_sums: Tensor
) -> tuple[Tensor, Tensor]:
    """num and den of the old tasks and the new one; the new one's values are checked."""
    sums = _native.add_chunks(arena.numels, chunk_sums)
    names = tensor_names(spec, arena)
    check_finite(sums[-1:], [task], names)
    check_finite(sums[:-1], [task] * (len(sums) - 1), names)
    return torch.cat([arena.num, sums[-1:]]), sums[:-1]


@without_autograd
def absorb(
    state: UnifiedDelta,
    task: str,
    finetuned: Model,
    pretrained: Model | None,
    *,
    missing: str = "error",
    match_dtype: bool = False,
    backend: str | None = None,
) -> UnifiedDelta:
    """Decouple every task of a state and unify them with one more model, in one pass.

    No decoupled delta is ever written; peak memory is the old state and the new one.

    Returns:
        A new state with ``task`` as its last; ``state`` is unchanged.
    """
    with state.lock:
        new = _Newcomer(state, task, finetuned, pretrained, missing, match_dtype)
        arenas = []
        for arena in state.arenas:
            u, planes, chunk_sums = kernels_for(backend, arena.device).absorb(
                arena.u,
                arena.planes,
                arena.rescaler,
                *_with_rule(new.inputs(arena), state.rule),
            )
            num, den = _absorbed_sums(arena, task, state.spec, chunk_sums)
            arenas.append(
                Arena(arena.index, arena.numels, u, list(planes), num, den, arena.rescaler)
            )
        tasks = [*state.tasks, task]
        warn_of(apply_rescalers(state.spec, arenas, state.rule, tasks, _alive(state)))
        private = {t: state.private_of(t) for t in state.tasks} | {task: new.private}
        return state.successor(arenas, tasks=tasks, private=private, spec=new.spec)


@without_autograd
def absorb_(
    state: UnifiedDelta,
    task: str,
    finetuned: Model,
    pretrained: Model | None,
    *,
    check: bool = True,
    missing: str = "error",
    match_dtype: bool = False,
    backend: str | None = None,
) -> None:
    """:func:`absorb` in place: extra memory is one bit a parameter.

    Args:
        check: read the inputs once more first, so that NaN or infinite values leave the state as
            it was. Without it they are found too late: the error then says that the state is lost,
            and every later use of it raises.
    """
    with state.lock:
        new = _Newcomer(state, task, finetuned, pretrained, missing, match_dtype)
        arenas = [(a, kernels_for(backend, a.device), new.inputs(a)) for a in state.arenas]
        if check:
            for arena, kernels, (model, base, via) in arenas:
                num = _native.add_chunks(arena.numels, kernels.measure(model, base, via))
                check_finite(num, [task], tensor_names(state.spec, arena))
        added = [
            torch.empty(arena.u.numel() // 8, dtype=torch.uint8, device=arena.device)
            for arena in state.arenas
        ]
        alive = _alive(state)
        state.mark_damaged(f"absorb_ of task {task!r} did not finish: the state is lost")
        sums = []
        for (arena, kernels, inputs), plane in zip(arenas, added, strict=True):
            chunk_sums = kernels.absorb_(
                arena.u, arena.planes, plane, arena.rescaler, *_with_rule(inputs, state.rule)
            )
            torch.autograd.graph.increment_version(arena.u)
            try:
                sums.append(_absorbed_sums(arena, task, state.spec, chunk_sums))
            except ValueError as error:
                lost = f"absorb_ of {error}; the state was overwritten and is lost"
                state.mark_damaged(lost)
                raise ValueError(lost) from None
        for arena, plane, (num, den) in zip(state.arenas, added, sums, strict=True):
            arena.planes.append(plane)
            arena.num, arena.den = num, den
        state.spec = new.spec
        state.add_task(task, new.private)
        died = apply_rescalers(state.spec, state.arenas, state.rule, state.tasks, alive)
        state.mark_damaged(None)
        warn_of(died)


def _with_rule(
    inputs: tuple[list[Tensor], list[Tensor], list[int]], rule: FusionRule
) -> tuple[list[Tensor], list[Tensor], int, list[int]]:
    model, base, via = inputs
    return model, base, ZERO_SUM_CODES[rule.zero_sum], via


def _alive(*states: UnifiedDelta) -> list[bool]:
    """Which tasks, one more included, still have a rescaler above 0."""
    alive = []
    for state in states:
        for t in range(len(state.tasks)):
            alive.append(any(bool((arena.rescaler[t] > 0).any()) for arena in state.arenas))
    return [*alive, True]


@without_autograd
def merge(a: UnifiedDelta, b: UnifiedDelta, *, backend: str | None = None) -> UnifiedDelta:
    """Join two states over the same base model: a's tasks, then b's.

    Raises:
        ValueError: tasks in common, another rule, dtype, base model, set of tensors, or device.
    """
    first, second = sorted((a, b), key=id)  # one order, whoever merges what into what
    with first.lock, second.lock:
        a.check_whole()
        b.check_whole()
        if common := set(a.tasks) & set(b.tasks):
            raise ValueError(f"both states hold task {min(common)!r}; rename one")
        for what, ours, theirs in (
            ("rule", a.rule, b.rule),
            ("dtype", a.dtype, b.dtype),
            ("private patterns", a.spec.private, b.spec.private),
        ):
            if ours != theirs:
                raise ValueError(f"the states differ in {what}: {ours} and {theirs}")
        _check_same_tensors(a, b)
        matching = b.arenas
        orders = [entry.order for entry in a.spec.tensors]
        if orders != [entry.order for entry in b.spec.tensors]:
            _, matching = rearranged(b.spec, b.arenas, b.devices(), orders)
        arenas = []
        for left, right in zip(a.arenas, matching, strict=True):
            u, planes, chunk_sums = kernels_for(backend, left.device).merge(
                left.u,
                left.planes,
                left.rescaler,
                right.u,
                right.planes,
                right.rescaler,
                list(left.numels),
                ZERO_SUM_CODES[a.rule.zero_sum],
            )
            den = _native.add_chunks(left.numels, chunk_sums)
            tasks = [*a.tasks, *b.tasks]
            check_finite(den, tasks, tensor_names(a.spec, left))
            num = torch.cat([left.num, right.num])
            arenas.append(Arena(left.index, left.numels, u, list(planes), num, den, left.rescaler))
        tasks = [*a.tasks, *b.tasks]
        warn_of(apply_rescalers(a.spec, arenas, a.rule, tasks, _alive(a, b)))
        private = {t: a.private_of(t) for t in a.tasks} | {t: b.private_of(t) for t in b.tasks}
        merged = a.successor(arenas, tasks=tasks, private=private)
        merged.base_name = a.base_name or b.base_name
        merged.base_fingerprints = b.base_fingerprints | a.base_fingerprints
        return merged


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
