"""Cases of sharded models against one process: unify, absorb, merge, decouple, bit for bit."""

from __future__ import annotations

import warnings
from collections.abc import Sequence

import torch
from kernel_cases import BF16, F32
from shard_group import Case, Group
from shard_models import (
    PRIVATE,
    Model,
    Spread,
    adopt_sums,
    assert_same_state,
    assert_spread,
    local,
    rescalers,
)
from torch import Tensor
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

import condu_ext as cx
from condu_ext.layout import ALIGN, CHUNK

State = cx.UnifiedDelta


def unified(
    spread: Spread, tasks: int = 2, *, first: int = 1, **options: object
) -> tuple[State, State]:
    """The same models unified sharded and in one process; both end with the same rescalers."""
    base = spread.base()
    models = {f"task {t}": spread.tuned(t) for t in range(first, first + tasks)}
    whole = cx.unify(models, base, private=PRIVATE, **options)  # type: ignore[arg-type]
    sharded = cx.unify(
        {task: spread.shard(model) for task, model in models.items()},
        spread.shard(base),
        private=PRIVATE,
        **options,  # type: ignore[arg-type]
    )
    assert_same_state(spread, sharded, whole)
    adopt_sums(whole, sharded)
    return sharded, whole


def unify_and_absorb(
    spread: Spread, absorbed: Sequence[int] = (3, 4, 5), **options: object
) -> tuple[State, State]:
    """Sequences by both ways to absorb, compared after every step."""
    sharded, whole = unified(spread, **options)
    base = spread.base()
    for task in absorbed:
        model = spread.tuned(task)
        given, start = spread.shard(model), spread.shard(base)
        if task == 4:
            cx.absorb_(whole, "4", model, base)
            cx.absorb_(sharded, "4", given, start, check=bool(options))
        else:
            old = [plane.clone() for arena in sharded.arenas for plane in arena.planes]
            before = sharded
            sharded = cx.absorb(sharded, str(task), given, start)
            kept = [plane for arena in before.arenas for plane in arena.planes]
            assert all(torch.equal(a, b) for a, b in zip(old, kept, strict=True))
            whole = cx.absorb(whole, str(task), model, base)
        assert_same_state(spread, sharded, whole)
        adopt_sums(whole, sharded)
    return sharded, whole


def small_models(group: Group) -> None:
    unify_and_absorb(group.small)


def large_models(group: Group) -> None:
    unify_and_absorb(group.large)


def hybrid_mesh_of_four(group: Group) -> None:
    unify_and_absorb(group.hybrid)


def grid_of_four(group: Group) -> None:
    spread = group.grid
    sharded, whole = unify_and_absorb(spread)
    base = spread.base()
    found = cx.decouple(sharded, "5", spread.shard(base))
    assert_spread(spread, found, cx.decouple(whole, "5", base))


def kinds_of_rescalers(group: Group) -> None:
    for kind in ("tensor_mean", "per_tensor"):
        unify_and_absorb(group.small, (4,), rule=cx.FusionRule(rescale=kind, zero_sum="zero"))


def bfloat16_state(group: Group) -> None:
    unify_and_absorb(group.small, (3, 4), dtype=BF16)


def reference_backend(group: Group) -> None:
    spread = group.small
    sharded, _ = unified(spread, backend="reference")
    assert sharded.tasks


def bfloat16_models(group: Group) -> None:
    """A bf16 model into an fp32 state, and an fp32 base rounded to it."""
    spread = group.small
    for dtype, options in ((BF16, {}), (F32, {"match_dtype": True})):
        base, models = spread.base(dtype), [spread.tuned(t, BF16) for t in (1, 2)]
        states = []
        for place in (spread.shard, Model):
            given = {str(t): place(model) for t, model in enumerate(models)}
            state = cx.unify(given, place(base), private=PRIVATE, **options)  # type: ignore[arg-type]
            states.append(state)
        sharded, whole = states
        assert_same_state(spread, sharded, whole)
        adopt_sums(whole, sharded)
        found = cx.decouple(sharded, "1", spread.shard(base))
        assert_spread(spread, found, cx.decouple(whole, "1", base))


def deltas_and_missing_tensors(group: Group) -> None:
    spread = group.small
    names = [n for n in spread.tensors if n not in ("uneven", "plain")]
    zero = {"steps": torch.tensor([0, 0])}  # of a delta
    models = {str(t): spread.tuned(t) | zero for t in (1, 2)}
    whole = cx.unify(models, None, private=PRIVATE)
    sharded = cx.unify({t: spread.shard(m) for t, m in models.items()}, None, private=PRIVATE)
    assert_same_state(spread, sharded, whole)
    adopt_sums(whole, sharded)
    part = {name: spread.tuned(3)[name] for name in names}
    whole = cx.absorb(whole, "3", part, None, missing="unchanged")
    sharded = cx.absorb(sharded, "3", spread.shard(part), None, missing="unchanged")
    assert_same_state(spread, sharded, whole)


def with_unequal_chunks(model: Model) -> Model:
    """Deltas whose chunks differ by so much that the order in which their sums are added shows."""

    def scaled(tensor: Tensor) -> Tensor:
        chunk = torch.arange(tensor.numel()) // CHUNK
        return tensor * (3.0 ** (5 * chunk % 17)).view(tensor.shape)

    fused = {name: scaled(t) for name, t in model.items() if t.is_floating_point()}
    return fused | {"steps": torch.tensor([0, 0]), "head.count": model["head.count"]}


def rescalers_at_chunk_borders(group: Group) -> None:
    """Where parts end on the borders of chunks, λ is a single process's bit for bit."""
    spread = group.on_borders
    models = {str(t): with_unequal_chunks(spread.tuned(t)) for t in (1, 2, 3)}
    sharded = cx.UnifiedDelta.empty(spread.shard(spread.base()), private=PRIVATE)
    whole = cx.UnifiedDelta.empty(spread.base(), private=PRIVATE)
    for task, model in models.items():
        sharded = cx.absorb(sharded, task, spread.shard(model), None)
        whole = cx.absorb(whole, task, model, None)
        for known in whole.tasks:
            assert list(rescalers(sharded, known)) == list(rescalers(whole, known))
    assert_same_state(spread, sharded, whole)
    (mine,), (theirs,) = sharded.arenas, whole.arenas
    assert torch.equal(mine.num, theirs.num)
    assert torch.equal(mine.den, theirs.den)


def merged_states(group: Group) -> None:
    spread = group.small
    sharded, whole = unified(spread)
    more_sharded, more_whole = unified(spread, 3, first=3)
    found, expected = cx.merge(sharded, more_sharded), cx.merge(whole, more_whole)
    assert_same_state(spread, found, expected)


def experts(group: Group) -> None:
    spread = group.small
    sharded, whole = unified(spread, 3)
    base = spread.base()
    start = spread.shard(base)
    for pretrained, given in ((base, start), (None, None)):
        found = cx.decouple(sharded, "task 2", given)
        assert_spread(spread, found, cx.decouple(whole, "task 2", pretrained))
    head = torch.zeros_like(whole.private("task 2")["head.weight"])
    out = spread.shard(spread.tuned(9) | {"head.weight": head})
    parts = {name: local(tensor) for name, tensor in out.items()}
    versions = {name: tensor._version for name, tensor in out.items()}
    cx.decouple_(sharded, "task 2", start, out=out)
    assert_spread(spread, out, {n: cx.decouple(whole, "task 2", base)[n] for n in out})
    for name, tensor in out.items():
        assert local(tensor) is parts[name]
        assert name == "steps" or tensor._version > versions[name]


def sharded_copies_and_sizes(group: Group) -> None:
    spread = group.small
    sharded, whole = unified(spread)
    assert_same_state(spread, sharded.to("cpu"), whole)
    assert f"over {group.world} processes" in repr(sharded)
    numel = sum(entry.numel for entry in whole.spec.tensors)
    assert f"{numel:,} parameters" in repr(sharded)
    for state in (sharded, whole):
        state.rename("task 1", "first")
        state.drop("task 2")
    assert_same_state(spread, sharded, whole)
    base = group.large.base()
    many, one = (cx.UnifiedDelta.empty(model) for model in (group.large.shard(base), base))
    parts = [e for e in one.spec.tensors if e.name != "large_plain"]
    here = sum(e.local_numel for e in many.spec.tensors if e.name != "large_plain")
    assert here <= 1.5 * sum(e.numel for e in parts) / group.world
    saved = one.nbytes - many.nbytes
    expected = 4 * (sum(e.numel for e in parts) - here)
    assert abs(saved - expected) <= 4 * ALIGN * len(parts)


def outvoted_task(group: Group) -> None:
    """A task that dies does so on all processes, also where it has no element."""
    mesh = group.mesh

    def model(value: float) -> Model:
        weights = torch.full((3, 2), value)
        return {"w": distribute_tensor(weights, mesh, [Shard(0)]), "b": torch.full((2,), value)}

    state = cx.unify({"weak": model(0.5)}, None)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        state = cx.absorb(state, "strong", model(-2.0), None)
    assert [str(w.message) for w in caught if "'weak' was outvoted" in str(w.message)]
    assert state.rescaler("weak") == 0
    assert not any(local(mask).any() for mask in state.mask("weak").values())


def tied_tensors(group: Group) -> None:
    """A tie is known to processes that have no element of it."""
    weight = distribute_tensor(torch.full((1, 4), 2.0), group.mesh, [Shard(0)])
    twin = DTensor.from_local(
        local(weight), group.mesh, [Shard(0)], shape=weight.shape, stride=weight.stride()
    )
    other = distribute_tensor(torch.full((1, 4), 1.0), group.mesh, [Shard(0)])
    model = {"a": weight, "other": other, "b": twin}
    for state in (cx.unify({"t": model}, None), cx.UnifiedDelta.empty(model)):
        assert state.spec.aliases == {"b": "a"}
        assert [entry.name for entry in state.spec.tensors] == ["a", "other"]
    state = cx.unify({"t": model}, None)
    assert list(cx.decouple(state, "t", None)) == ["a", "other", "b"]


def fully_sharded_module(group: Group) -> None:
    """A module of fully_shard after a step of its optimiser, and back to an expert."""
    from torch.distributed.fsdp import fully_shard

    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(5, 33), torch.nn.ReLU(), torch.nn.Linear(33, 1))
    model[2].tied = model[2].bias
    fully_shard(model[0], mesh=group.mesh)
    fully_shard(model, mesh=group.mesh)

    def live() -> Model:
        return dict(model.named_parameters(remove_duplicate=False))

    def copy() -> Model:
        return {name: tensor.detach().clone() for name, tensor in live().items()}

    def whole(tensors: Model) -> Model:
        gathered = {name: tensor.full_tensor() for name, tensor in tensors.items()}  # type: ignore[attr-defined]
        return gathered | {"2.tied": gathered["2.bias"]}

    inputs = torch.randn(8, 5)
    base = copy()
    base["2.tied"] = base["2.bias"]
    state, expected = cx.UnifiedDelta.empty(base), cx.UnifiedDelta.empty(whole(base))
    for task in ("a", "b"):
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
        model(inputs).square().mean().backward()
        optimizer.step()
        before = {name: local(t).data_ptr() for name, t in live().items()}
        tuned = whole(live())
        state = cx.absorb(state, task, live(), base)
        expected = cx.absorb(expected, task, tuned, whole(base))
        adopt_sums(expected, state)
        with torch.no_grad():
            cx.decouple_(state, task, base, out=live())
        assert {name: local(t).data_ptr() for name, t in live().items()} == before
        theta = cx.decouple(expected, task, whole(base))
        for name, tensor in whole(live()).items():
            assert torch.equal(tensor, theta[name]), name
        plain = torch.nn.Sequential(torch.nn.Linear(5, 33), torch.nn.ReLU(), torch.nn.Linear(33, 1))
        plain.load_state_dict({n: t for n, t in theta.items() if n != "2.tied"})
        assert torch.allclose(model(inputs), plain(inputs), atol=1e-6)  # forward gathers anew
    assert state.spec.aliases == {"2.tied": "2.bias"}


def replicated_is_counted_once(group: Group) -> None:
    """Replicated and plain tensors in the sums, by hand."""
    for tensor in (torch.full((6,), 0.5), torch.full((2, 3), 0.5)):
        for placement in (Replicate(), Shard(0)):
            given = distribute_tensor(tensor, group.mesh, [placement])
            state = cx.unify({"t": {"w": given, "plain": torch.full((4,), 0.25)}}, None)
            assert state.arenas[0].num.tolist() == [[3.0, 1.0]]
            assert state.arenas[0].den.tolist() == [[3.0, 1.0]]


FUSING: tuple[Case, ...] = (
    small_models,
    large_models,
    hybrid_mesh_of_four,
    grid_of_four,
    kinds_of_rescalers,
    bfloat16_state,
    bfloat16_models,
    reference_backend,
    deltas_and_missing_tensors,
    rescalers_at_chunk_borders,
    merged_states,
    experts,
    sharded_copies_and_sizes,
    outvoted_task,
    tied_tensors,
    fully_sharded_module,
    replicated_is_counted_once,
)
