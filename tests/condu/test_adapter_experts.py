"""Expert blocks in which the caller turns to the adapter itself."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from tiny_adapters import adapted, base_weights, finetune

from condu import ConDU


@pytest.mark.parametrize("space", ["factors", "product"])
@pytest.mark.parametrize("change", ["disable", "select", "merge"])
def test_an_expert_block_ends_whatever_was_done_to_the_adapter(space: Any, change: str) -> None:
    model = adapted("patterns")
    model.add_adapter("other", model.peft_config["default"])
    fusion = ConDU(model, space=space)
    finetune(model, 0)
    fusion.absorb("a")
    base, start = base_weights(model), dict(fusion.pretrained)
    stays = change == "merge" and space == "factors"  # W_0 itself has changed then
    calls = {
        "disable": model.base_model.disable_adapter_layers,
        "select": lambda: model.base_model.set_adapter("other"),
        "merge": model.merge_adapter,
    }
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        with pytest.raises(KeyError, match="mine"), fusion.expert("a"):  # noqa: PT012
            calls[change]()
            raise KeyError("mine")
    messages = [str(w.message) for w in caught if "expert 'a' is still active" in str(w.message)]
    assert len(messages) == stays
    if stays:
        assert "is merged into" in messages[0]
        with pytest.raises(RuntimeError, match="is merged into"):
            fusion.reset()
        assert fusion.active == "a"
        model.unmerge_adapter()
        fusion.reset()
        for name, weight in base_weights(model).items():
            torch.testing.assert_close(weight, base[name])
    else:
        assert all(torch.equal(w, base[name]) for name, w in base_weights(model).items())
    assert fusion.active is None
    for name, tensor in fusion.model.named_parameters():
        if ".default." in name and space == "factors":
            assert torch.equal(tensor, start[name.replace(".default", "")])


def test_an_expert_block_without_an_error_of_its_own_raises_what_reset_does() -> None:
    model = adapted("patterns")
    fusion = ConDU(model)
    finetune(model, 0)
    fusion.absorb("a")
    with pytest.raises(RuntimeError, match="is merged into"), fusion.expert("a"):
        model.merge_adapter()
    model.unmerge_adapter()
    fusion.reset()
    assert fusion.active is None
