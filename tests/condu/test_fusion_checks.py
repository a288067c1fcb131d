"""What ConDU says about a task before it is fine-tuned."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from condu.fusion import ConDU


@pytest.fixture
def model() -> nn.Sequential:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))
    model[0].bias.requires_grad_(False)
    return model


def test_a_model_as_it_was_passes(model: nn.Sequential) -> None:
    fusion = ConDU(model)
    fusion.check_new_task("cars")
    assert fusion.model is model
    assert fusion.moved() == ()


def test_moved_names_trainable_parameters_alone(model: nn.Sequential) -> None:
    fusion = ConDU(model)
    model(torch.randn(8, 3))  # BatchNorm's statistics move
    with torch.no_grad():
        model[2].bias += 1
    assert fusion.moved() == ("2.bias",)
    fusion.check_new_task("cars")  # fine-tuning may go on from anywhere
    fusion.reset()
    assert fusion.moved() == ()


def test_task_names(model: nn.Sequential) -> None:
    fusion = ConDU(model)
    fusion.absorb("cars")
    with pytest.raises(ValueError, match="task 'cars' is already in the state"):
        fusion.check_new_task("cars")
    with pytest.raises(ValueError, match="non-empty string, not ''"):
        fusion.check_new_task("")
    with fusion.expert("cars"), pytest.raises(RuntimeError, match="expert 'cars' is active"):
        fusion.check_new_task("food")


def test_parameters_that_were_not_trainable_at_the_start(model: nn.Sequential) -> None:
    fusion = ConDU(model)
    model[0].bias.requires_grad_(True)
    with pytest.raises(ValueError, match=r"parameter '0\.bias' requires grad now"):
        fusion.check_new_task("cars")


def test_an_excluded_name_tied_to_a_fused_one_is_known(model: nn.Sequential) -> None:
    model.append(nn.Linear(4, 2))
    model[3].weight = model[2].weight
    ConDU(model, exclude=("3.weight",)).check_new_task("cars")


def test_changed_tensors(model: nn.Sequential) -> None:
    fusion = ConDU(model)
    model.bfloat16()
    with pytest.raises(ValueError, match=r"'0\.weight': is torch\.bfloat16, narrower .*float32"):
        fusion.check_new_task("cars")
    model.float()
    model[2].weight = nn.Parameter(torch.zeros(2, 5))
    with pytest.raises(ValueError, match=r"'2\.weight' of the model has shape \[2, 5\]"):
        fusion.check_new_task("cars")


def test_a_wider_model_passes(model: nn.Sequential) -> None:
    fusion = ConDU(model.bfloat16())
    model.float()
    fusion.check_new_task("cars")
    fusion.absorb("cars")
