"""Where a unified checkpoint is read to: placed as another model's tensors are."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from kernel_cases import same_bytes
from torch import Tensor

import condu_ext as cx


def model(seed: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(4, 3, 2, 2, generator=generator)
    bias = torch.randn(9, generator=generator)
    return {
        "conv": weight.to(memory_format=torch.channels_last),
        "bias": bias,
        "tied": bias,
        "head": torch.randn(2 + seed, 3, generator=generator),
    }


@pytest.fixture
def saved(tmp_path: Path) -> tuple[Path, cx.UnifiedDelta]:
    state = cx.unify({"a": model(1), "b": model(2)}, model(0), private=("head",))
    state.save(tmp_path)
    return tmp_path, state


def test_a_plain_model_changes_nothing(saved: tuple[Path, cx.UnifiedDelta]) -> None:
    """Names that are not the state's, values, dtypes and private shapes of it do not matter."""
    folder, state = saved
    like = {
        "tied": torch.zeros(9),
        "conv": torch.zeros(4, 3, 2, 2).bfloat16(),
        "more": torch.ones(1),
    }
    for placed in (like, like | {"head": torch.zeros(7)}):
        loaded = cx.UnifiedDelta.load(folder, like=placed)
        assert loaded.spec == state.spec
        for name, tensor in state.delta.items():
            assert same_bytes(loaded.delta[name], tensor)
        for task in state.tasks:
            assert torch.equal(loaded.private(task)["head"], state.private(task)["head"])
            assert torch.equal(loaded.mask(task)["conv"], state.mask(task)["conv"])
            assert loaded.rescaler(task) == state.rescaler(task)
        cx.absorb_(loaded, "c", model(3), model(0))
    assert same_bytes(loaded.delta["conv"], cx.absorb(state, "c", model(3), model(0)).delta["conv"])


def test_what_does_not_fit_is_named(saved: tuple[Path, cx.UnifiedDelta]) -> None:
    folder, _ = saved
    good = model(0)
    for wrong, error, text in (
        ({"conv": good["conv"]}, KeyError, "like: tensor 'bias' is missing"),
        (good | {"conv": torch.zeros(3)}, ValueError, r"like, tensor 'conv': shape \(3,\)"),
        (good | {"conv": torch.zeros(4, 3, 2, 2, device="meta")}, TypeError, "'conv': .*meta"),
        (torch.nn.Linear(2, 2), TypeError, "like: expected a mapping"),
    ):
        with pytest.raises(error, match=text):
            cx.UnifiedDelta.load(folder, like=wrong)
