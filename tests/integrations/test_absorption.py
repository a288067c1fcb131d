"""What the callbacks share, without the libraries."""

from __future__ import annotations

import subprocess
import sys
import warnings

import pytest
import torch
from torch import nn

from condu import ConDU
from condu.integrations.absorption import TaskAbsorption


def train(model: nn.Module) -> None:
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 1


def test_a_task_is_absorbed_once_and_only_after_it_began() -> None:
    model = nn.Linear(2, 2)
    fusion = ConDU(model)
    absorption = TaskAbsorption("cars", fusion)
    absorption.end()
    assert fusion.tasks == ()
    absorption.begin(model, resumed=False)
    train(model)
    absorption.end()
    absorption.end()
    assert fusion.tasks == ("cars",)


@pytest.mark.parametrize(("fused", "trained"), [(0, 1), (1, 0)])
def test_wrappers_of_either_side_are_seen_through(fused: int, trained: int) -> None:
    models = (model := nn.Linear(2, 2)), nn.DataParallel(model)
    absorption = TaskAbsorption("cars", ConDU(models[fused]))
    absorption.begin(models[trained], resumed=False)
    train(model)
    absorption.end()
    assert set(absorption.fusion.state.delta) == {"weight", "bias"}


def test_a_parameter_unfrozen_on_the_way_is_named_and_nothing_is_lost() -> None:
    model = nn.Linear(2, 2)
    model.bias.requires_grad_(False)
    absorption = TaskAbsorption("cars")
    absorption.begin(model, resumed=False)
    model.bias.requires_grad_(True)
    train(model)
    with pytest.raises(ValueError, match="task 'cars': parameter 'bias' requires grad now"):
        absorption.end()
    assert absorption.fusion.moved() == ("weight",)
    assert absorption.fusion.tasks == ()
    model.bias.requires_grad_(False)
    absorption.end()
    assert absorption.fusion.tasks == ("cars",)


def test_a_start_elsewhere_than_at_the_pretrained_weights_is_mentioned() -> None:
    model = nn.Linear(2, 2)
    fusion = ConDU(model)
    train(model)
    with pytest.warns(UserWarning, match=r"'cars' starts from .* \('weight' and 1 more differ\)"):
        TaskAbsorption("cars", fusion).begin(model, resumed=False)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        TaskAbsorption("cars", fusion).begin(model, resumed=True)


def test_an_active_expert_is_refused() -> None:
    model = nn.Linear(2, 2)
    fusion = ConDU(model)
    train(model)
    fusion.absorb("cars")
    with fusion.expert("cars"), pytest.raises(RuntimeError, match="expert 'cars' is active"):
        TaskAbsorption("food", fusion).begin(model, resumed=False)


def test_arguments() -> None:
    with pytest.raises(ValueError, match="task's name is a non-empty string, not None"):
        TaskAbsorption(None)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="fusion must be a ConDU, got Linear"):
        TaskAbsorption("cars", nn.Linear(2, 2))  # type: ignore[arg-type]


def test_libraries_are_imported_by_their_integration_alone_and_named_if_missing() -> None:
    script = """
import sys
import condu
assert not [m for m in ("transformers", "lightning", "condu.integrations") if m in sys.modules]
for library in "transformers", "lightning":
    sys.modules[library] = None
    try:
        __import__(f"condu.integrations.{library}")
    except ModuleNotFoundError as error:
        assert f"pip install {library}" in str(error), error
    else:
        raise AssertionError(library)
"""
    subprocess.run([sys.executable, "-c", script], check=True, timeout=120)
