"""Unify and absorb: models by name in, states out.

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
cannot be fused (float64, quantised), ``ValueError`` for everything else; all name the task and the
tensor, and leave every argument as it was.

Sharded models (:mod:`condu_ext.sharding`): every process of the device mesh makes the same call,
with its parts of the same tensors; all of a task's models are placed alike. An error on one process
is raised on all.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from condu_ext._dispatch import (
    ZERO_SUM_CODES,
    Sources,
    kernels_for,
    read_base,
    tensor_names,
)
from condu_ext._modes import without_autograd
from condu_ext.collective import Step
from condu_ext.inputs import (
    Model,
    check_devices,
    check_fixed,
    check_private,
    describe,
    private_tensors,
    resolve,
)
from condu_ext.layout import Arena, ModelSpec, group_by_device
from condu_ext.newcomer import Inputs, Newcomer, claims_of_call, claims_of_task
from condu_ext.rescale import apply_rescalers, check_finite, warn_of
from condu_ext.rounding import with_rounding
from condu_ext.rule import FusionRule
from condu_ext.sharding import local_part, mesh_of
from condu_ext.sums import SumStep
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
    mesh = mesh_of(pretrained, *(models.values() if isinstance(models, Mapping) else ()))
    rule = rule or FusionRule()
    with Step(mesh) as step:
        tasks = _check_tasks(models)
        check_state_dtype(dtype)
        who, template = next((f"task {task!r}", model) for task, model in models.items())
        if pretrained is not None:
            who, template = "pretrained", pretrained
        spec = describe(who, template, private if isinstance(private, str) else tuple(private))
        step.mine = spec.aliases
        step.claims |= {"the tasks": tasks, "the rule": rule, "the state's dtype": dtype}

    with Step(mesh) as checks:
        spec = spec.with_ties(step.all)
        base = read_base(spec, pretrained)
        devices = [local_part(template[entry.name]).device for entry in spec.tensors]
        groups = group_by_device(devices)
        kernels = [kernels_for(backend, device) for device in groups]
        resolved: list[list[Tensor | None]] = []
        for k, (task, model) in enumerate(models.items()):
            who = f"task {task!r}"
            tensors = resolve(spec, who, model, missing)
            check_private(spec, who, model, missing)
            check_fixed(spec, who, model, pretrained)
            check_devices(spec, who, tensors, devices)
            spec = with_rounding(spec, who, tensors, base, match_dtype=match_dtype, settled=k > 0)
            resolved.append(tensors)
            checks.claims |= claims_of_task(spec, who, model, tensors)
        checks.claims |= claims_of_call(spec, pretrained, groups.values())

    start = Sources(spec, base)
    fused = []
    with SumStep(spec, [*tasks, *tasks]) as summing:
        for (device, index), own in zip(groups.items(), kernels, strict=True):
            theta_0 = start.flat(index, None, device) if pretrained is not None else []
            fallback = start if pretrained is not None else None
            flat = [
                t
                for tensors in resolved
                for t in Sources(spec, tensors).flat(index, fallback, device)
            ]
            u, planes, chunk_sums = own.unify(
                flat, theta_0, len(tasks), ZERO_SUM_CODES[rule.zero_sum], dtype, start.via(index)
            )
            summing.add(index, chunk_sums)
            fused.append((index, u, list(planes)))

    arenas = []
    for (index, u, planes), sums in zip(fused, summing.sums(), strict=True):
        numels = tuple(spec.tensors[k].local_numel for k in index)
        num, den = sums[: len(tasks)], sums[len(tasks) :]
        arena = Arena(tuple(index), numels, u, planes, num, den, torch.zeros(num.shape))
        check_finite(num, tasks, tensor_names(spec, arena))
        check_finite(den, tasks, tensor_names(spec, arena))
        arenas.append(arena)
    warn_of(apply_rescalers(spec, arenas, rule, tasks, [True] * len(tasks)))
    kept = {task: private_tensors(spec, model) for task, model in models.items()}
    return UnifiedDelta(spec, arenas, tasks=tasks, rule=rule, dtype=dtype, private=kept)


def _check_tasks(models: Mapping[str, Model]) -> list[str]:
    if not isinstance(models, Mapping):
        raise TypeError(
            f"models: expected a mapping from task names to models, got {type(models).__name__}"
        )
    if not models:
        raise ValueError("models: there is no model to unify")
    return [check_task_name(task) for task in models]


def _check_sums(arena: Arena, task: str, spec: ModelSpec, sums: Tensor) -> tuple[Tensor, Tensor]:
    """num and den of the old tasks and the new one; the new one's values are checked."""
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
        with Step(state.spec.mesh) as step:
            new = Newcomer(state, task, finetuned, pretrained, missing, match_dtype)
            kernels = [kernels_for(backend, arena.device) for arena in state.arenas]
            step.claims |= new.claims
        fused = []
        with SumStep(state.spec, [task] * (len(state.tasks) + 1)) as summing:
            for arena, own in zip(state.arenas, kernels, strict=True):
                u, planes, chunk_sums = own.absorb(
                    arena.u,
                    arena.planes,
                    arena.rescaler,
                    *_with_rule(new.inputs(arena), state.rule),
                )
                summing.add(arena.index, chunk_sums)
                fused.append((arena, u, list(planes)))
        arenas = []
        for (arena, u, planes), sums in zip(fused, summing.sums(), strict=True):
            num, den = _check_sums(arena, task, state.spec, sums)
            arenas.append(Arena(arena.index, arena.numels, u, planes, num, den, arena.rescaler))
        tasks = [*state.tasks, task]
        warn_of(apply_rescalers(state.spec, arenas, state.rule, tasks, [*state.alive(), True]))
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
        with Step(state.spec.mesh) as step:
            new = Newcomer(state, task, finetuned, pretrained, missing, match_dtype)
            arenas = [(a, kernels_for(backend, a.device), new.inputs(a)) for a in state.arenas]
            added = [
                torch.empty(arena.u.numel() // 8, dtype=torch.uint8, device=arena.device)
                for arena in state.arenas
            ]
            step.claims |= new.claims | {"check": check}
        if check:
            _check_values(state, task, arenas)
        alive = [*state.alive(), True]
        state.mark_damaged(f"absorb_ of task {task!r} did not finish: the state is lost")
        with SumStep(state.spec, [task] * (len(state.tasks) + 1)) as summing:
            for (arena, kernels, inputs), plane in zip(arenas, added, strict=True):
                chunk_sums = kernels.absorb_(
                    arena.u, arena.planes, plane, arena.rescaler, *_with_rule(inputs, state.rule)
                )
                torch.autograd.graph.increment_version(arena.u)
                summing.add(arena.index, chunk_sums)
        try:
            tables = [
                _check_sums(arena, task, state.spec, sums)
                for arena, sums in zip(state.arenas, summing.sums(), strict=True)
            ]
        except ValueError as error:
            lost = f"absorb_ of {error}; the state was overwritten and is lost"
            state.mark_damaged(lost)
            raise ValueError(lost) from None
        for arena, plane, (num, den) in zip(state.arenas, added, tables, strict=True):
            arena.planes.append(plane)
            arena.num, arena.den = num, den
        state.spec = new.spec
        state.add_task(task, new.private)
        died = apply_rescalers(state.spec, state.arenas, state.rule, state.tasks, alive)
        state.mark_damaged(None)
        warn_of(died)


def _check_values(
    state: UnifiedDelta, task: str, arenas: Sequence[tuple[Arena, Any, Inputs]]
) -> None:
    """Refuse NaN and infinity before anything is overwritten."""
    with SumStep(state.spec, [task]) as summing:
        for arena, kernels, (model, base, via) in arenas:
            summing.add(arena.index, kernels.measure(model, base, via))
    for (arena, _, _), num in zip(arenas, summing.sums(), strict=True):
        check_finite(num, [task], tensor_names(state.spec, arena))


def _with_rule(
    inputs: Inputs, rule: FusionRule
) -> tuple[list[Tensor], list[Tensor], int, list[int]]:
    model, base, via = inputs
    return model, base, ZERO_SUM_CODES[rule.zero_sum], via
