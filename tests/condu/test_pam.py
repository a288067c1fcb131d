from __future__ import annotations

import math
from collections import OrderedDict
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import distribute_module

from condu.pam import AlignedMerging


def adapter(seed: int = 0) -> nn.Module:
    """Two factors that learn beside a weight that does not."""
    torch.manual_seed(seed)
    model = nn.Module()
    model.a = nn.Parameter(torch.randn(3, 40))
    model.b = nn.Parameter(torch.randn(50, 3))
    model.weight = nn.Parameter(torch.randn(50, 40), requires_grad=False)
    return model


def put(model: nn.Module, seed: int) -> dict[str, Tensor]:
    """Other values in the factors, as a fine-tuning would leave them; returns copies."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in (model.a, model.b):
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
    return live(model)


def live(model: nn.Module) -> dict[str, Tensor]:
    return {"a": model.a.detach().clone(), "b": model.b.detach().clone()}


def begun(**options: Any) -> tuple[nn.Module, AlignedMerging, dict[str, Tensor]]:
    """A model whose first task is merged, and the global adapter after it."""
    model = adapter()
    merging = AlignedMerging(model, **options)
    first = put(model, 1)
    assert merging.merge() is None
    return model, merging, first


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


# Merging


def test_the_first_task_becomes_the_global_adapter_as_it_is() -> None:
    model, merging, first = begun()
    assert same(merging.global_adapter, first)
    assert same(live(model), first)
    assert merging.tasks == 1


def test_half_averages_with_what_there_was() -> None:
    model, merging, first = begun()
    second = put(model, 2)
    merging.merge()
    expected = {name: 0.5 * first[name] + 0.5 * second[name] for name in first}
    assert same(live(model), expected)
    assert same(merging.global_adapter, expected)


def test_mean_counts_all_tasks_the_same() -> None:
    model, merging, first = begun(average="mean")
    tasks = [first]
    for seed in (2, 3, 4):
        tasks.append(put(model, seed))
        merging.merge()
    for name, value in live(model).items():
        mean = torch.stack([task[name].double() for task in tasks]).mean(dim=0)
        torch.testing.assert_close(value.double(), mean, rtol=0, atol=1e-6)


def test_the_misaligned_share_is_that_of_opposite_signs() -> None:
    model, merging, first = begun()
    second = put(model, 2)
    opposite = sum(int((first[name] * second[name] < 0).sum()) for name in first)
    share = opposite / (3 * 40 + 50 * 3)
    assert 0.3 < share < 0.7
    assert merging.misaligned() == share
    assert same(live(model), second)  # measuring changes nothing
    assert merging.merge() == share


def test_merging_drops_gradients_and_leaves_frozen_weights_alone() -> None:
    model, merging, _ = begun()
    frozen = model.weight.clone()
    model.a.grad = torch.ones_like(model.a)
    merging.merge()
    assert model.a.grad is None
    assert torch.equal(model.weight, frozen)


def test_weights_that_are_not_finite_are_not_merged() -> None:
    model, merging, first = begun()
    put(model, 2)
    with torch.no_grad():
        model.b[0, 0] = math.nan
    with pytest.raises(ValueError, match="tensor 'b': has NaN or infinite values"):
        merging.merge()
    assert same(merging.global_adapter, first)
    assert merging.tasks == 1


# Aligning


@pytest.mark.parametrize("to", ["zero", "global"])
def test_every_period_th_step_puts_conflicting_weights_back(to: Any) -> None:
    model, merging, first = begun(period=3, to=to, top=0.25)
    second = put(model, 2)
    for _ in range(2):
        merging.align()
        assert same(live(model), second)
    merging.align()
    for name, value in live(model).items():
        g, w = first[name], second[name]
        strongest = (
            g.abs() >= g.abs().flatten().sort(descending=True).values[-(-g.numel() // 4) - 1]
        )
        conflict = strongest & (g.sign() * w.sign() < 0)
        assert 0 < int(conflict.sum()) < int(strongest.sum())
        assert torch.equal(value, torch.where(conflict, g if to == "global" else 0.0, w))
    put(model, 3)
    third = live(model)
    merging.align()
    assert same(live(model), third)  # the count of steps goes on


def test_global_scope_takes_one_threshold_for_all_tensors() -> None:
    model = adapter()
    merging = AlignedMerging(model, period=1, scope="global", top=0.5)
    with torch.no_grad():
        model.a.mul_(100)  # so that the strongest half are nearly all of a, and some of b
    merging.merge()
    with torch.no_grad():
        model.a.neg_()
        model.b.neg_()
    merging.align()
    zeros = {name: int((value == 0).sum()) for name, value in live(model).items()}
    assert zeros["a"] > 110
    assert sum(zeros.values()) == 135  # ⌈0.5 · 270⌉


def test_the_optimiser_forgets_what_was_put_back_and_nothing_else() -> None:
    model, merging, _ = begun(period=1)
    put(model, 2)
    optimizer = torch.optim.AdamW([model.a, model.b], lr=0.0)
    model.a.grad, model.b.grad = torch.ones_like(model.a), torch.ones_like(model.b)
    optimizer.step()
    merging.align(optimizer)
    put_back = model.a.detach() == 0
    assert 0 < int(put_back.sum()) < put_back.numel()
    for moment in ("exp_avg", "exp_avg_sq"):
        assert torch.equal(optimizer.state[model.a][moment] == 0, put_back)
    assert float(optimizer.state[model.a]["step"]) == 1


def test_the_optimiser_may_keep_what_it_remembers() -> None:
    model, merging, _ = begun(period=1, reset_optimizer=False)
    put(model, 2)
    optimizer = torch.optim.SGD([model.a, model.b], lr=0.0, momentum=0.9)
    model.a.grad, model.b.grad = torch.ones_like(model.a), torch.ones_like(model.b)
    optimizer.step()
    merging.align(optimizer)
    assert bool((model.a == 0).any())
    assert bool((optimizer.state[model.a]["momentum_buffer"] == 1).all())


def test_before_the_first_task_and_without_aligning_nothing_is_put_back() -> None:
    model = adapter()
    merging = AlignedMerging(model, period=1)
    before = live(model)
    merging.align()
    assert same(live(model), before)
    model, merging, _ = begun(period=1, align=False)
    second = put(model, 2)
    merging.align()
    assert same(live(model), second)


def test_the_count_of_steps_begins_anew_with_each_task() -> None:
    model, merging, _ = begun(period=2)
    merging.align()
    merging.merge()
    second = put(model, 2)
    merging.align()
    assert same(live(model), second)
    merging.align()
    assert not same(live(model), second)


# Going on


def test_resuming_is_as_if_it_had_gone_on() -> None:
    model, merging, _ = begun(period=1, average="mean")
    other = adapter(seed=9)
    resumed = AlignedMerging(other, period=1, average="mean")
    resumed.resume(merging.global_adapter, tasks=1)
    assert same(live(other), live(model))
    for each, tuned in ((model, merging), (other, resumed)):
        put(each, 2)
        tuned.align()
        tuned.merge()
    assert same(live(other), live(model))


def test_what_does_not_fit_is_refused_and_changes_nothing() -> None:
    model, merging, first = begun()
    before = live(model)
    with pytest.raises(KeyError, match="adapter: tensor 'b' is missing"):
        merging.resume({"a": first["a"]}, tasks=1)
    with pytest.raises(ValueError, match=r"adapter, tensor 'a': shape \[40, 3\].* \[3, 40\]"):
        merging.resume({"a": first["a"].T, "b": first["b"]}, tasks=1)
    with pytest.raises(ValueError, match="tasks must be at least 1, got 0"):
        merging.resume(first, tasks=0)
    with pytest.raises(KeyError, match="adapter: tensor 'c' is no trainable parameter"):
        merging.resume({**first, "c": first["a"]}, tasks=1)
    with pytest.raises(ValueError, match="tensor 'b': has NaN or infinite values"):
        merging.resume({**first, "b": first["b"] * math.inf}, tasks=1)
    assert same(live(model), before)
    assert same(merging.global_adapter, first)


def test_parameters_that_were_replaced_are_found_again() -> None:
    model, merging, first = begun(period=1)
    second = {name: -value for name, value in first.items()}
    model.load_state_dict({**second, "weight": model.weight}, assign=True)
    assert merging.misaligned() == 1
    merging.merge()
    assert all(bool((value == 0).all()) for value in live(model).values())


def test_sharded_weights_are_refused() -> None:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        model, merging, _ = begun(period=1)
        distribute_module(model, init_device_mesh("cpu", (1,)))
        for call in (merging.align, merging.misaligned, merging.merge):
            with pytest.raises(TypeError, match=r"model, tensor '[ab]': is sharded"):
                call()
        with pytest.raises(TypeError, match="model, tensor 'a': is sharded"):
            AlignedMerging(model)
    finally:
        dist.destroy_process_group()


def test_a_dtype_that_cannot_be_merged_is_refused_before_training() -> None:
    with pytest.raises(TypeError, match=r"model, tensor 'a': torch\.float64 cannot be fused"):
        AlignedMerging(adapter().double())


def test_names_do_not_depend_on_wrappers() -> None:
    _, merging, first = begun()
    wrapped = AlignedMerging(nn.Sequential(OrderedDict(module=adapter(seed=3))))
    wrapped.resume(merging.global_adapter, tasks=1)
    assert same(wrapped.global_adapter, first)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"top": 0.0}, r"top must be in \(0, 1\], got 0.0"),
        ({"period": 0}, "period must be a number of steps from 1 on, got 0"),
        ({"period": 1.5}, "period must be a number of steps from 1 on, got 1.5"),
        ({"to": "nought"}, "to must be 'zero' or 'global', got 'nought'"),
        ({"scope": "layer"}, "scope must be 'tensor' or 'global', got 'layer'"),
        ({"average": "third"}, "average must be 'half' or 'mean', got 'third'"),
    ],
)
def test_wrong_options_are_named(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        AlignedMerging(adapter(), **options)


def test_a_model_without_an_adapter_is_refused() -> None:
    with pytest.raises(ValueError, match="no parameter that requires grad"):
        AlignedMerging(adapter().requires_grad_(False))
