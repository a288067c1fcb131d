"""From which θ_0 tasks start: rounded where a fine-tuned model is narrower, and the same for all;
and adapters, which bring differences from it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from range_models import assert_same, model, moved, save
from reading import values
from torch import Tensor, nn

import condu_ext as cx
from condu import checkpoint
from condu.checkpoint import Options
from condu.checkpoint.sources import open_source


def narrow(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {n: t.bfloat16() if t.is_floating_point() else t for n, t in tensors.items()}


def adapter(folder: Path, *layers: str) -> Path:
    """A LoRA adapter of matrices of 300 by 41."""
    bare = nn.ModuleDict({name: nn.Linear(41, 300, bias=False) for name in layers})
    adapted = get_peft_model(bare, LoraConfig(r=3, target_modules=list(layers)))
    torch.manual_seed(0)
    for parameter in adapted.parameters():
        nn.init.normal_(parameter, std=0.05)
    adapted.save_pretrained(folder)
    return folder


def with_layers(tensors: dict[str, Tensor], *layers: str) -> dict[str, Tensor]:
    """A model whose matrix is under the names of the weights of ``layers``."""
    return tensors | {f"{name}.weight": 1 / 3 + tensors["matrix"] for name in layers}


def test_a_state_has_one_start(tmp_path: Path) -> None:
    base = model(0)
    where = save(base, tmp_path / "base.safetensors")
    tasks = {
        "wide": save(moved(base, 1), tmp_path / "wide.safetensors"),
        "narrow": save(narrow(moved(base, 2)), tmp_path / "narrow.safetensors"),
    }
    options = Options(match_dtype=True)
    differs = r"task 'narrow', tensor 'bias': is torch\.bfloat16, but earlier tasks started from"
    with pytest.raises(ValueError, match=differs):
        checkpoint.unify(where, tasks, tmp_path / "state", options=options)
    assert not (tmp_path / "state").exists()
    checkpoint.unify(where, {"wide": tasks["wide"]}, tmp_path / "state")
    with pytest.raises(ValueError, match=differs):
        checkpoint.absorb(
            tmp_path / "state", "narrow", tasks["narrow"], base=where, options=options
        )
    assert cx.UnifiedDelta.load(tmp_path / "state").tasks == ("wide",)


def test_what_a_narrow_model_lacks_did_not_move(tmp_path: Path) -> None:
    base = model(0)
    tasks = {"a": narrow(moved(base, 1)), "b": narrow(moved(base, 2))}
    del tasks["b"]["matrix"]
    checkpoint.unify(
        save(base, tmp_path / "base.safetensors"),
        {task: save(t, tmp_path / f"{task}.safetensors") for task, t in tasks.items()},
        tmp_path / "state",
        options=Options(match_dtype=True, on_mismatch="skip"),
    )
    assert not cx.UnifiedDelta.load(tmp_path / "state").mask("b")["matrix"].any()
    expected = cx.unify(tasks, base, match_dtype=True, missing="unchanged")
    expected.record_base(base)
    assert_same(tmp_path / "state", expected)


def test_a_narrow_model_beside_an_adapter(tmp_path: Path) -> None:
    base = with_layers(model(0), "proj")
    tuned = narrow(moved(base, 1, coarse=False))
    lora = adapter(tmp_path / "lora", "proj")
    checkpoint.unify(
        save(base, tmp_path / "base.safetensors"),
        {"whole": save(tuned, tmp_path / "whole.safetensors"), "lora": lora},
        tmp_path / "state",
        options=Options(match_dtype=True),
    )
    found = cx.UnifiedDelta.load(tmp_path / "state")
    fused = [name for name, tensor in base.items() if tensor.is_floating_point()]
    deltas = {
        "whole": {n: tuned[n].float() - base[n].bfloat16().float() for n in fused},
        "lora": {n: torch.zeros_like(base[n]) for n in fused}
        | {"proj.weight": values(open_source(lora), "proj.weight")},
    }
    expected = cx.unify(deltas, None)
    for name in fused:
        assert torch.equal(found.delta[name], expected.delta[name]), name
    for task in deltas:
        assert found.rescaler(task) == expected.rescaler(task)


def test_an_adapter_of_a_private_tensor_is_refused(tmp_path: Path) -> None:
    base = with_layers(model(0), "proj", "head")
    where = save(base, tmp_path / "base.safetensors")
    lora = adapter(tmp_path / "lora", "proj", "head")
    before = sorted(tmp_path.iterdir())
    with pytest.raises(ValueError, match=r"task 'a': the adapter changes 'head\.weight', which is"):
        checkpoint.unify(where, {"a": lora}, tmp_path / "state", private=["head.*"])
    assert sorted(tmp_path.iterdir()) == before
    own = adapter(tmp_path / "own", "proj")  # leaves the head as it is in the base
    checkpoint.unify(where, {"a": own}, tmp_path / "state", private=["head.*"])
    assert not cx.UnifiedDelta.load(tmp_path / "state").private("a")
