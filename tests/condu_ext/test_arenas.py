"""States of several arenas, as models that are spread over devices have them.

One arena a device; on a machine with one device such a state is made here by dealing the tensors of
an ordinary state out to two arenas. Nothing that a state says or does may depend on the division.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from kernel_cases import same_bytes
from torch import Tensor

import condu_ext as cx
from condu_ext.layout import Arena, empty_arena

Model = dict[str, Tensor]
SHAPES = {"a": (30, 7), "b": (1000,), "none": (0,), "c": (), "d": (2, 3, 4, 5)}
RULES = pytest.mark.parametrize("rescale", ["global", "tensor_mean", "per_tensor"])


def model(seed: int) -> Model:
    generator = torch.Generator().manual_seed(seed)
    made: Model = {n: torch.randn(s, generator=generator) for n, s in SHAPES.items()}
    made["d"] = made["d"].to(memory_format=torch.channels_last)
    made["tied"] = made["b"]
    return made


def deal(state: cx.UnifiedDelta, *parts: tuple[int, ...]) -> cx.UnifiedDelta:
    """The same state with the tensors of each part in an arena of its own."""
    (whole,) = state.arenas
    arenas = []
    for part in parts:
        columns = list(part)
        numels = [whole.numels[k] for k in part]
        arena: Arena = empty_arena(part, numels, state.dtype, whole.device)
        arena.planes = [torch.zeros(len(arena.u) // 8, dtype=torch.uint8) for _ in state.tasks]
        for start, numel, k in zip(arena.starts, numels, part, strict=True):
            source, last = whole.starts[k], (numel + 7) // 8
            arena.u[start : start + numel] = whole.u[source : source + numel]
            for new, old in zip(arena.planes, whole.planes, strict=True):
                new[start // 8 : start // 8 + last] = old[source // 8 : source // 8 + last]
        arena.num, arena.den = whole.num[:, columns], whole.den[:, columns]
        arena.rescaler = whole.rescaler[:, columns]
        arenas.append(arena)
    private = {task: state.private_of(task) for task in state.tasks}
    return state.successor(arenas, tasks=state.tasks, private=private)


DIVISIONS = pytest.mark.parametrize("parts", [((0, 2, 4), (1, 3)), ((4,), (3, 1), (2, 0))])


def snapshot(state: cx.UnifiedDelta) -> dict[str, Any]:
    seen: dict[str, Any] = {"tasks": state.tasks}
    seen |= {f"u {n}": t for n, t in state.delta.items()}
    for task in state.tasks:
        seen[f"rescaler {task}"] = state.rescaler(task)
        kinds = (state.packed_mask(task), cx.decouple(state, task, model(0)))
        for k, tensors in enumerate(kinds):
            seen |= {f"{task} {k} {n}": t for n, t in tensors.items()}
    return seen


def assert_equal(found: cx.UnifiedDelta, expected: cx.UnifiedDelta) -> None:
    left, right = snapshot(found), snapshot(expected)
    assert list(left) == list(right)
    for name, value in right.items():
        if isinstance(value, Tensor):
            assert same_bytes(left[name], value), name
        else:
            assert left[name] == value, name


def whole_state(rescale: str, *seeds: int) -> cx.UnifiedDelta:
    models = {f"t{seed}": model(seed) for seed in seeds}
    return cx.unify(models, model(0), rule=cx.FusionRule(rescale=rescale))  # type: ignore[arg-type]


@RULES
@DIVISIONS
def test_reading(parts: tuple[tuple[int, ...], ...], rescale: str) -> None:
    state = whole_state(rescale, 1, 2)
    assert_equal(deal(state, *parts), state)


@RULES
@DIVISIONS
@pytest.mark.parametrize("how", ["absorb", "absorb_", "merge", "drop", "to", "save"])
def test_changing(
    parts: tuple[tuple[int, ...], ...], rescale: str, how: str, tmp_path: Path
) -> None:
    def absorb_(state: cx.UnifiedDelta, _: cx.UnifiedDelta) -> cx.UnifiedDelta:
        cx.absorb_(state, "new", model(3), model(0))
        return state

    def drop(state: cx.UnifiedDelta, _: cx.UnifiedDelta) -> cx.UnifiedDelta:
        state.drop("t1")
        return cx.absorb(state, "new", model(3), model(0))

    def save(state: cx.UnifiedDelta, _: cx.UnifiedDelta) -> cx.UnifiedDelta:
        state.save(tmp_path)
        return cx.UnifiedDelta.load(tmp_path)

    uses: dict[str, Callable[[cx.UnifiedDelta, cx.UnifiedDelta], cx.UnifiedDelta]] = {
        "absorb": lambda state, _: cx.absorb(state, "new", model(3), model(0)),
        "absorb_": absorb_,
        "merge": cx.merge,
        "drop": drop,
        "to": lambda state, _: state.to("cpu"),
        "save": save,
    }
    states = (whole_state(rescale, 1, 2), whole_state(rescale, 4, 5))
    found = uses[how](*(deal(s, *parts) for s in states))
    assert_equal(found, uses[how](*states))
    if how in ("absorb", "absorb_", "merge"):
        assert len(found.arenas) == len(parts)


@DIVISIONS
def test_a_task_dies_in_all_arenas_or_in_none(parts: tuple[tuple[int, ...], ...]) -> None:
    ones = {n: torch.ones(s) for n, s in SHAPES.items()}
    strong = {n: -3 * t for n, t in ones.items()}
    state = deal(cx.unify({"weak": ones}, None), *parts)
    with pytest.warns(UserWarning, match="'weak'") as caught:
        dead = cx.absorb(state, "strong", strong, None)
    assert len(caught) == 1
    assert not any(m.any() for m in dead.mask("weak").values())
    strong["c"] = torch.zeros(())
    alive = cx.absorb(state, "strong", strong, None)
    assert {n for n, m in alive.mask("weak").items() if m.any()} == {"c"}


def test_bad_values_in_the_second_arena() -> None:
    """Nothing of the first arena may have changed by then."""
    state = deal(whole_state("global", 1, 2), (0, 2, 4), (1, 3))
    expected = whole_state("global", 1, 2)
    broken = model(3)
    broken["c"].fill_(torch.nan)
    for use in (cx.absorb, cx.absorb_):
        with pytest.raises(ValueError, match=r"'new'.*'c'"):
            use(state, "new", broken, model(0))
        assert_equal(state, expected)
