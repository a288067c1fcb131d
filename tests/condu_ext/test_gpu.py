"""Models on a GPU: the same bits as on the CPU, and errors that name both devices."""

from __future__ import annotations

import pytest
import torch
from kernel_cases import same_bytes
from torch import Tensor

import condu_ext as cx

pytestmark = pytest.mark.gpu
Model = dict[str, Tensor]


def model(seed: int, device: str = "cpu") -> Model:
    generator = torch.Generator().manual_seed(seed)
    sizes = {"w": (300, 257), "b": (31,), "s": ()}
    return {n: torch.randn(s, generator=generator).to(device) for n, s in sizes.items()}


def three_tasks(device: str) -> cx.UnifiedDelta:
    base = model(0, device)
    state = cx.unify({"a": model(1, device), "b": model(2, device)}, base)
    return cx.absorb(state, "c", model(3, device), base)


def test_the_same_bits_as_on_the_cpu() -> None:
    """Given the same incoming state: rescalers may differ, so each step starts from the CPU's."""
    state = cx.unify({"a": model(1), "b": model(2)}, model(0))
    here = cx.absorb(state, "c", model(3), model(0))
    there = cx.absorb(state.to("cuda"), "c", model(3, "cuda"), model(0, "cuda"))
    for name, u in here.delta.items():
        assert there.delta[name].is_cuda
        assert same_bytes(there.delta[name].cpu(), u)
    for task in here.tasks:
        assert there.rescaler(task) == pytest.approx(here.rescaler(task), rel=4 * 2.0**-23)
        for name, mask in here.packed_mask(task).items():
            assert same_bytes(there.packed_mask(task)[name].cpu(), mask)
    moved = here.to("cuda")
    for task in here.tasks:
        theta = cx.decouple(moved, task, model(0, "cuda"))
        for name, expected in cx.decouple(here, task, model(0)).items():
            assert same_bytes(theta[name].cpu(), expected)


def test_there_and_back() -> None:
    state = three_tasks("cpu")
    copy = state.to("cuda").to("cpu")
    for name, u in state.delta.items():
        assert same_bytes(copy.delta[name], u)
    assert [copy.rescaler(t) for t in copy.tasks] == [state.rescaler(t) for t in state.tasks]


def test_a_model_on_two_devices() -> None:
    """Each tensor is fused where it lies, in one state of two arenas."""

    def spread(seed: int) -> Model:
        made = model(seed)
        return made | {"w": made["w"].to("cuda")}

    state = cx.unify({"a": spread(1), "b": spread(2)}, spread(0))
    assert state.delta["w"].is_cuda
    assert not state.delta["b"].is_cuda
    expected = cx.unify({"a": model(1), "b": model(2)}, model(0))
    for name, u in expected.delta.items():
        assert same_bytes(state.delta[name].cpu(), u)


def test_devices_that_differ() -> None:
    state = three_tasks("cpu")
    with pytest.raises(ValueError, match=r"'d'.*'w'.*cuda:0.*cpu"):
        cx.absorb(state, "d", model(4, "cuda"), model(0))
    with pytest.raises(ValueError, match=r"pretrained.*'w'.*cuda:0.*cpu"):
        cx.decouple(state, "a", model(0, "cuda"))
    with pytest.raises(ValueError, match=r"out.*'w'.*cuda:0.*cpu"):
        cx.decouple_(state, "a", model(0), out=model(4, "cuda"))
    other = cx.unify({"d": model(4, "cuda")}, model(0, "cuda"))
    with pytest.raises(ValueError, match=r"cpu.*cuda:0"):
        cx.merge(state, other)


def test_values_that_are_not_finite() -> None:
    state, broken = three_tasks("cuda"), model(4, "cuda")
    broken["b"][3] = torch.nan
    with pytest.raises(ValueError, match=r"'d'.*'b'"):
        cx.absorb_(state, "d", broken, model(0, "cuda"))
    assert state.tasks == ("a", "b", "c")
