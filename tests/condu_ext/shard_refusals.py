"""Cases of bad input on one process: all raise, no state changes, and the next call works."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from shard_fusing import unified
from shard_group import Case, Group
from shard_models import PRIVATE, Model, Spread, assert_same_state, local
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor

import condu_ext as cx


def snapshot(state: cx.UnifiedDelta) -> list[Tensor]:
    (arena,) = state.arenas
    tensors = [arena.u, *arena.planes, arena.num, arena.den, arena.rescaler]
    return [tensor.clone() for tensor in tensors]


def assert_unchanged(state: cx.UnifiedDelta, before: list[Tensor]) -> None:
    after = snapshot(state)
    assert len(after) == len(before)
    assert all(torch.equal(a, b) for a, b in zip(after, before, strict=True))


def without(name: str) -> Callable[[Spread, Model], Model]:
    return lambda spread, model: {n: t for n, t in model.items() if n != name}


def with_tensor(name: str, make: Callable[[Spread, Model], Tensor]) -> Callable[..., Model]:
    return lambda spread, model: model | {name: make(spread, model)}


def transposed(spread: Spread, model: Model) -> Tensor:
    return distribute_tensor(torch.zeros(7, 33), spread.mesh, [Shard(0)])


def otherwise_placed(spread: Spread, model: Model) -> Tensor:
    return DTensor.from_local(torch.zeros(33, 7), spread.mesh, [Replicate()], run_check=False)


def not_finite(value: float) -> Callable[[Spread, Model], Model]:
    def spoil(spread: Spread, model: Model) -> Model:
        spoilt = {name: tensor.clone() for name, tensor in model.items()}
        local(spoilt["columns"]).view(-1)[-1:] = value
        return spoilt

    return spoil


# What the last process makes of a good model, and what all must say.
MISTAKES: tuple[tuple[Callable[[Spread, Model], Model], type[Exception], str], ...] = (
    (without("uneven"), KeyError, "tensor 'uneven' is missing"),
    (without("head.weight"), KeyError, "private tensor 'head.weight' is missing"),
    (
        with_tensor("uneven", transposed),
        ValueError,
        r"'uneven': shape \(7, 33\), expected \(33, 7\)",
    ),
    (with_tensor("more", transposed), ValueError, "'more' .* is not in the base"),
    (
        with_tensor("plain", lambda spread, model: model["plain"].double()),
        TypeError,
        "'plain': torch.float64 cannot be fused",
    ),
    (
        with_tensor("steps", lambda spread, model: model["steps"] + 1),
        ValueError,
        "integer tensor 'steps'",
    ),
    (
        with_tensor("uneven", otherwise_placed),
        ValueError,
        r"'uneven': placed as \(Replicate\(\)\).*\(Shard\(dim=0\)\)",
    ),
    (
        with_tensor("uneven", lambda spread, model: torch.zeros(33, 7)),
        ValueError,
        "'uneven': placed as a plain tensor",
    ),
    (not_finite(float("nan")), ValueError, "tensor 'columns'.*NaN or infinite"),
    (not_finite(float("-inf")), ValueError, "tensor 'columns'.*NaN or infinite"),
)


def mistakes_of_one_process(group: Group) -> None:
    spread = group.small
    base = spread.shard(spread.base())
    state, whole = unified(spread)
    before = snapshot(state)
    good = spread.shard(spread.tuned(3))
    for spoil, error, text in MISTAKES:
        spoilt = spoil(spread, good)
        given = spoilt if group.last else good
        for call in (
            lambda given=given: cx.absorb(state, "new", given, base),
            lambda given=given: cx.absorb_(state, "new", given, base),
            lambda given=given: cx.unify({"old": good, "new": given}, base, private=PRIVATE),
        ):
            with pytest.raises(error, match=text) as caught:
                call()
            assert "'new'" in str(caught.value)
            assert_unchanged(state, before)
            assert state.tasks == whole.tasks
    found = cx.absorb(state, "new", good, base)
    assert_same_state(spread, found, cx.absorb(whole, "new", spread.tuned(3), spread.base()))


def who_made_the_mistake(group: Group) -> None:
    """Elsewhere the error names the rank; where it was made it is the error itself."""
    spread = group.small
    base = spread.shard(spread.base())
    state, _ = unified(spread)
    given = base if not group.last else without("uneven")(spread, base)
    with pytest.raises(KeyError) as caught:
        cx.decouple(state, "task 1", given)
    text = "pretrained: tensor 'uneven' is missing"
    expected = text if group.last else f"rank {group.world - 1}: {text}"
    assert caught.value.args == (expected,)
    out = {name: tensor.clone() for name, tensor in base.items()}
    out["head.weight"] = state.private("task 1")["head.weight"]
    spoilt = out if not group.last else without("uneven")(spread, out)
    with pytest.raises(KeyError, match="out: tensor 'uneven' is missing"):
        cx.decouple_(state, "task 1", base, out=spoilt)
    for name in spread.tensors:
        assert torch.equal(local(out[name]), local(base[name]))
    with pytest.raises(KeyError, match="unknown task 'nothing'"):
        cx.decouple(state, "nothing" if group.last else "task 1", base)
    with pytest.raises(KeyError, match="pretrained: tensor 'uneven' is missing"):
        state.record_base(given)
    assert state.base_fingerprints == {}


def processes_that_disagree(group: Group) -> None:
    """Calls that are good on each process, but not the same."""
    if group.world == 1:
        return
    spread = group.small
    base = spread.shard(spread.base())
    good = spread.shard(spread.tuned(3))
    state, _ = unified(spread)
    less = without("columns")(spread, good) if group.last else good
    with pytest.raises(ValueError, match=r"differ in the missing tensors of task 'x'.*'columns'"):
        cx.absorb(state, "x", less, base, missing="unchanged")
    name = "y" if group.last else "x"
    with pytest.raises(ValueError, match=r"differ in .*'x'.*rank 0.*'y'"):
        cx.absorb(state, name, good, base)
    delta = good | {"steps": torch.zeros_like(good["steps"])}
    call = (delta, None) if group.last else (good, base)
    with pytest.raises(ValueError, match="differ in whether there is a pretrained model"):
        cx.absorb(state, "x", *call)
    with pytest.raises(ValueError, match="differ in whether there is a pretrained model"):
        cx.decouple(state, "task 1", call[1])
    with pytest.raises(ValueError, match=r"differ in the task: 'task 1' on rank 0, 'task 2'"):
        cx.decouple(state, "task 2" if group.last else "task 1", base)
    with pytest.raises(ValueError, match=r"differ in check: True on rank 0, False"):
        cx.absorb_(state, "x", good, base, check=not group.last)
    for option, values in (
        ("rule", (cx.FusionRule(), cx.FusionRule("zero"))),
        ("dtype", (torch.float32, torch.bfloat16)),
    ):
        with pytest.raises(ValueError, match=rf"differ in the (state's )?{option}: "):
            cx.UnifiedDelta.empty(base, **{option: values[group.last]})
    for change in (
        lambda head: head.bfloat16(),
        lambda head: head.full_tensor(),
        lambda head: head.redistribute(placements=[Replicate()]),
    ):
        changed = good | {"head.weight": change(good["head.weight"])}  # collective
        other = changed if group.last else good
        with pytest.raises(ValueError, match=r"differ in the private tensors of task 'x'"):
            cx.absorb(state, "x", other, base)
    other = {"rule": cx.FusionRule("zero")} if group.last else {}
    with pytest.raises(ValueError, match=r"differ in the rule: .*negative.* on rank 0, .*zero"):
        cx.unify({"x": good}, base, private=PRIVATE, **other)
    with pytest.raises(ValueError, match=r"differ in tensor 'columns'.*none on rank"):
        cx.UnifiedDelta.empty(without("columns")(spread, base) if group.last else base)
    other, _ = unified(spread, 1, first=3)
    if group.last:
        other.rename("task 3", "task 4")
    folder = group.shared("disagreeing")
    for call in (lambda: cx.merge(state, other), lambda: other.save(folder)):
        with pytest.raises(ValueError, match=r"differ in the tasks: .*'task 3'.*'task 4'"):
            call()
    if group.last:
        state.drop("task 1")
    with pytest.raises(ValueError, match="differ in the tasks"):
        cx.absorb(state, "x", good, base)


def copies_that_differ(group: Group) -> None:
    """Plain and replicated tensors are every process's own memory, and may drift apart."""
    if group.world == 1:
        return
    spread = group.small
    base = spread.shard(spread.base())
    good = spread.shard(spread.tuned(3))
    state, _ = unified(spread)
    before = snapshot(state)
    for name in ("plain", "replicated"):
        for value, text in (
            (1.0, rf"task 'new', tensor '{name}': ranks 0 and {group.world - 1} .* differ"),
            (float("nan"), rf"task 'new', tensor '{name}': .*NaN"),
        ):
            given = {n: t.clone() for n, t in good.items()}
            if group.last:
                local(given[name])[0, 0] += value
            for call in (cx.absorb, cx.absorb_):
                with pytest.raises(ValueError, match=text):
                    call(state, "new", given, base)
                assert_unchanged(state, before)
    cx.absorb_(state, "new", good, base)


def damage_is_everywhere(group: Group) -> None:
    """absorb_ without a check: NaN on one process ends the state on all."""
    spread = group.small
    base = spread.shard(spread.base())
    state, _ = unified(spread)
    good = spread.shard(spread.tuned(3))
    given = not_finite(float("nan"))(spread, good) if group.last else good
    with pytest.raises(ValueError, match="overwritten and is lost"):
        cx.absorb_(state, "new", given, base, check=False)
    with pytest.raises(RuntimeError, match="is lost"):
        state.delta  # noqa: B018


def failing_kernels(group: Group) -> None:
    """What goes wrong while one process computes, all hear; nobody waits for its sums."""
    spread = group.small
    base = spread.shard(spread.base())
    state, _ = unified(spread)
    before = snapshot(state)
    good = spread.shard(spread.tuned(3))
    from condu_ext import _ops

    class OutOfMemory(MemoryError):
        """Known to this process only."""

    def broken(*_: object) -> None:
        raise OutOfMemory("not enough memory")

    with pytest.MonkeyPatch.context() as patch:
        if group.last:
            patch.setattr(_ops, "absorb", broken)
        with pytest.raises(MemoryError, match="not enough memory"):
            cx.absorb(state, "new", good, base)
    assert_unchanged(state, before)
    assert cx.absorb(state, "new", good, base).tasks[-1] == "new"
    out = {name: tensor.clone() for name, tensor in base.items()}
    out["head.weight"] = state.private("task 1")["head.weight"]
    for call in (
        lambda: cx.decouple(state, "task 1", base),
        lambda: cx.decouple_(state, "task 1", base, out=out),
    ):
        with pytest.MonkeyPatch.context() as patch:
            if group.last:
                patch.setattr(_ops, "decouple_", broken)
            with pytest.raises(MemoryError, match="not enough memory"):
                call()


def placements_that_cannot_be_fused(group: Group) -> None:
    mesh = group.mesh
    pending = DTensor.from_local(torch.ones(4), mesh, [Partial()], run_check=False)
    with pytest.raises(TypeError, match=r"'w': placed as \(Partial"):
        cx.unify({"t": {"w": pending}}, None)
    with pytest.raises(TypeError, match=r"'head': placed as \(Partial"):
        cx.unify({"t": {"w": torch.ones(4), "head": pending}}, None, private=("head",))
    rows = 3 if group.rank == 0 else 1
    uneven = DTensor.from_local(
        torch.ones(rows, 2),
        mesh,
        [Shard(0)],
        run_check=False,
        shape=torch.Size([2 + group.world, 2]),
        stride=(2, 1),
    )
    if group.world > 1:
        with pytest.raises(TypeError, match=r"'w': (placed|its part)"):
            cx.unify({"t": {"w": uneven}}, None)


def strided_shards_of_four(group: Group) -> None:
    """FSDP2 over tensor parallelism: torch's _StridedShard."""
    from torch.distributed.tensor.placement_types import _StridedShard

    mesh = init_device_mesh("cpu", (2, 2))
    tensor = DTensor.from_local(
        torch.ones(2, 2),
        mesh,
        [_StridedShard(0, split_factor=2), Shard(0)],
        run_check=False,
        shape=torch.Size([8, 2]),
        stride=(2, 1),
    )
    with pytest.raises(TypeError, match=r"'w': placed as .*only Shard and Replicate"):
        cx.unify({"t": {"w": tensor}}, None)


def two_meshes_of_four(group: Group) -> None:
    other = init_device_mesh("cpu", (2, 2))
    one = distribute_tensor(torch.ones(4), group.mesh, [Shard(0)])
    two = distribute_tensor(torch.ones(4), other, [Replicate(), Shard(0)])
    with pytest.raises(ValueError, match=r"tensor 'two': is sharded over .*, but 'one' is over"):
        cx.unify({"t": {"one": one, "two": two}}, None)
    state = cx.unify({"t": {"w": one}}, None)
    with pytest.raises(ValueError, match="tensor 'w'"):
        cx.absorb(state, "u", {"w": two}, None)
    with pytest.raises(ValueError, match="device mesh"):
        cx.merge(state, cx.unify({"v": {"w": two}}, None))


def plain_and_sharded_states(group: Group) -> None:
    spread = group.small
    sharded, whole = unified(spread)
    base, model = spread.base(), spread.tuned(3)
    with pytest.raises(ValueError, match=r"'uneven': is sharded over .*the base is not sharded"):
        cx.absorb(whole, "x", spread.shard(model), base)
    with pytest.raises(ValueError, match="'uneven': placed as a plain tensor"):
        cx.absorb(sharded, "x", model, spread.shard(base))
    whole.rename("task 1", "a")
    whole.rename("task 2", "b")
    with pytest.raises(ValueError, match="device mesh"):
        cx.merge(sharded, whole)


def whole_tensors_only(group: Group) -> None:
    """What does not work on parts says so."""
    spread = group.small
    state, _ = unified(spread)
    with pytest.raises(TypeError, match=r"packed_mask, tensor 'uneven': is sharded.*use mask"):
        state.packed_mask("task 1")
    adapter = {"w": distribute_tensor(torch.ones(4, 2), group.mesh, [Shard(0)])}
    plain = {"w": torch.ones(4, 2)}
    for call in (
        lambda: cx.magnitude_threshold(adapter),
        lambda: cx.align_(plain, adapter, {"w": torch.tensor(0.5)}),
        lambda: cx.align_(adapter, plain, {"w": torch.tensor(0.5)}),
        lambda: cx.average_(adapter, plain),
        lambda: cx.average_(plain, adapter),
    ):
        with pytest.raises(TypeError, match="'w': is sharded"):
            call()


def targets_that_cannot_be_written(group: Group) -> None:
    spread = group.small
    state, _ = unified(spread)
    base = spread.shard(spread.base())
    out = dict(base) | {"uneven": torch.nn.Parameter(base["uneven"].clone())}
    with pytest.raises(RuntimeError, match="'uneven': a leaf that requires grad"):
        cx.decouple_(state, "task 1", base, out=out)
    with pytest.raises(ValueError, match="shares memory"):
        cx.decouple_(state, "task 1", base, out=base)
    out = {name: tensor.clone() for name, tensor in base.items()}
    head = state.private("task 1")["head.weight"].full_tensor()
    out["head.weight"] = distribute_tensor(head, group.mesh, [Replicate()])
    text = r"private tensor 'head.weight': placed as \(Replicate\(\)\)"
    with pytest.raises(ValueError, match=text):
        cx.decouple_(state, "task 1", base, out=out)


def ranks_of_a_grid_of_four(group: Group) -> None:
    """An error names the right one of processes in two dimensions."""
    spread = group.grid
    base = spread.shard(spread.base())
    state = cx.UnifiedDelta.empty(base, private=PRIVATE)
    for culprit in range(4):
        given = without("twice")(spread, base) if group.rank == culprit else base
        with pytest.raises(KeyError, match="'twice' is missing") as caught:
            cx.absorb(state, "t", given, base)
        assert (f"rank {culprit}:" in str(caught.value)) == (group.rank != culprit)


def modules_of_fsdp1(group: Group) -> None:
    """Flattened shards have other shapes than the model; gathered ones can be fused."""
    from torch.distributed.fsdp import FullyShardedDataParallel

    cpu = torch.device("cpu")
    for original in (False, True):
        layers = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Linear(4, 1))
        model = FullyShardedDataParallel(layers, use_orig_params=original, device_id=cpu)
        flat = [dict(model.named_parameters())]
        if not original:
            flat.append(dict(model.module.named_parameters()))
        for tensors in flat:
            with pytest.raises(TypeError, match=r"'.*': is a flattened shard .*fully_shard"):
                cx.unify({"t": tensors}, None)
        with FullyShardedDataParallel.summon_full_params(model):
            state = cx.unify({"t": dict(model.named_parameters())}, None)
            assert {tuple(t.shape) for t in state.delta.values()} == {(4, 3), (4,), (1, 4), (1,)}


REFUSALS: tuple[Case, ...] = (
    mistakes_of_one_process,
    who_made_the_mistake,
    processes_that_disagree,
    copies_that_differ,
    damage_is_everywhere,
    failing_kernels,
    placements_that_cannot_be_fused,
    strided_shards_of_four,
    two_meshes_of_four,
    plain_and_sharded_states,
    whole_tensors_only,
    targets_that_cannot_be_written,
    ranks_of_a_grid_of_four,
    modules_of_fsdp1,
)
