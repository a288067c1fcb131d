"""One case with its inputs: how the kernels are called, and how each baseline is."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import condu_ext as cx
from condu.bench.baselines import Baseline
from condu.bench.cases import Case
from condu.bench.check import Parts, count, cut, excerpts, require_same_bits, sample
from condu.bench.inputs import Inputs, Weights, task_name
from condu.bench.sums import norm_of, require_sums, sums_of
from condu_ext import reference

NEW = "new task"


@dataclass
class Operation:
    """What is timed is ``run(prepare())``, without ``prepare``.

    Attributes:
        prepare: makes what ``run`` needs afresh where ``run`` destroys it; nothing otherwise.
        run: calls the kernels through :mod:`condu_ext`; returns the new state, or the expert.
        check: compares parts of a result with the reference, bit for bit, and a state's sums with
            float64; returns how many elements were compared bit for bit.
        baseline: for a baseline, the call without arguments that gives the same.
    """

    prepare: Callable[[], Any]
    run: Callable[[Any], Any]
    check: Callable[[Any], int]
    baseline: Callable[[Baseline], Callable[[], Any]]


def operation_of(case: Case, inputs: Inputs) -> Operation:
    """Make the inputs of a case and bind the calls to them."""
    backend = inputs.device.type  # never a fallback to plain PyTorch
    if case.operation == "unify":
        return _unify(case, inputs, backend)
    if case.operation == "merge":
        return _merge(case, inputs, backend)
    if case.operation == "decouple_":
        return _decouple(case, inputs, backend)
    return _absorb(case, inputs, backend)


def _nothing() -> None:
    return None


def _unify(case: Case, inputs: Inputs, backend: str) -> Operation:
    models, base, dtype = inputs.models(case.tasks), inputs.pretrained, case.dtypes.state
    parts = sample(case.shapes)

    def run(_: None) -> cx.UnifiedDelta:
        return cx.unify(models, base, dtype=dtype, backend=backend)

    def check(result: cx.UnifiedDelta) -> int:
        for name, found in excerpts(result, parts).items():
            thetas = [_cut(model, name, parts) for model in models.values()]
            theta_0 = [_cut(base, name, parts)]
            u, planes, _ = reference.unify(thetas, theta_0, case.tasks, 0, dtype, ())
            found.require_equal(u, planes, f"{case}, tensor {name}")
        require_sums(result, lambda task, name: norm_of(models[task][name], base[name]), str(case))
        return count(parts)

    def baseline(chosen: Baseline) -> Callable[[], Any]:
        return lambda: chosen.unify(list(models.values()), base, dtype)

    return Operation(_nothing, run, check, baseline)


def _absorb(case: Case, inputs: Inputs, backend: str) -> Operation:
    state, base = inputs.state(case.tasks), inputs.pretrained
    model = inputs.newcomer(case.tasks)
    parts = sample(case.shapes)

    def copied() -> cx.UnifiedDelta:
        return state.to(inputs.device)

    def in_place(own: cx.UnifiedDelta) -> cx.UnifiedDelta:
        check = case.operation == "absorb_+check"
        cx.absorb_(own, NEW, model, base, check=check, backend=backend)
        return own

    def out_of_place(_: None) -> cx.UnifiedDelta:
        return cx.absorb(state, NEW, model, base, backend=backend)

    def check(result: cx.UnifiedDelta) -> int:
        old = excerpts(state, parts)
        for name, found in excerpts(result, parts).items():
            theta, theta_0 = [_cut(model, name, parts)], [_cut(base, name, parts)]
            was = old[name]
            u, planes, _ = reference.absorb(was.u, was.planes, was.rescaler, theta, theta_0, 0, ())
            found.require_equal(u, planes, f"{case}, tensor {name}")
        kept = sums_of(state)

        def norm(task: str, name: str) -> float:
            return norm_of(model[name], base[name]) if task == NEW else kept[task, name][0]

        require_sums(result, norm, str(case))
        return count(parts)

    def baseline(chosen: Baseline) -> Callable[[], Any]:
        own = chosen.state_of(state)
        return lambda: chosen.absorb(own, model, base)

    if case.operation == "absorb":
        return Operation(_nothing, out_of_place, check, baseline)
    return Operation(copied, in_place, check, baseline)


def _merge(case: Case, inputs: Inputs, backend: str) -> Operation:
    a, b = inputs.halves(case.tasks)
    parts = sample(case.shapes)

    def run(_: None) -> cx.UnifiedDelta:
        return cx.merge(a, b, backend=backend)

    def check(result: cx.UnifiedDelta) -> int:
        old_a, old_b = excerpts(a, parts), excerpts(b, parts)
        for name, found in excerpts(result, parts).items():
            x, y = old_a[name], old_b[name]
            u, planes, _ = reference.merge(
                x.u, x.planes, x.rescaler, y.u, y.planes, y.rescaler, [found.numel], 0
            )
            found.require_equal(u, planes, f"{case}, tensor {name}")
        kept = sums_of(a) | sums_of(b)
        require_sums(result, lambda task, name: kept[task, name][0], str(case))
        return count(parts)

    def baseline(chosen: Baseline) -> Callable[[], Any]:
        own_a, own_b = chosen.state_of(a), chosen.state_of(b)
        return lambda: chosen.merge(own_a, own_b)

    return Operation(_nothing, run, check, baseline)


def _decouple(case: Case, inputs: Inputs, backend: str) -> Operation:
    state, base = inputs.state(case.tasks), inputs.pretrained
    task = case.tasks // 2
    live = inputs.newcomer(case.tasks)
    parts = sample(case.shapes)

    def run(_: None) -> Weights:
        with torch.no_grad():
            cx.decouple_(state, task_name(task), base, out=live, backend=backend)
        return live

    def check(result: Weights) -> int:
        for name, old in excerpts(state, parts).items():
            expert, theta_0 = _cut(result, name, parts), [_cut(base, name, parts)]
            expected = torch.empty_like(expert)
            plane, rescaler = old.planes[task], old.rescaler[task]
            reference.decouple_([expected], old.u, plane, rescaler, theta_0, ())
            require_same_bits(expert, expected, f"{case}, tensor {name}: expert")
        return count(parts)

    def baseline(chosen: Baseline) -> Callable[[], Any]:
        own, out = chosen.state_of(state), inputs.empty_model()
        for tensor in out.values():
            tensor.zero_()  # a live model's pages have been touched

        def call() -> Weights:
            chosen.decouple_(own, task, base, out)
            return out

        return call

    return Operation(_nothing, run, check, baseline)


def _cut(model: Weights, name: str, parts: Parts) -> Tensor:
    return cut(model[name].view(-1), parts[name])
