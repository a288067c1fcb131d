"""Models of three architectures, from the folders that users have to folders that load again."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import open_clip
import pytest
import tiny_models
import torch
from open_clip.model import CLIP
from peft import LoraConfig, PeftModel, get_peft_model
from range_models import load
from torch import Tensor, nn
from transformers import (
    AutoProcessor,
    AutoTokenizer,
    LlamaForCausalLM,
    LlavaForConditionalGeneration,
)

import condu_ext as cx
from condu import checkpoint
from condu.checkpoint import Options

KINDS: dict[str, tuple[Callable[..., nn.Module], Any]] = {
    "llama": (tiny_models.llama, LlamaForCausalLM),
    "llava": (tiny_models.llava, LlavaForConditionalGeneration),
}


def test_language_and_vision_language_models(tmp_path: Path) -> None:
    for name, (make, kind) in KINDS.items():
        home = tmp_path / name
        make(home / "base", seed=0, dtype=torch.bfloat16)
        tasks = {
            task: tiny_models.finetuned(home / "base", home / task, seed=k)
            for k, task in enumerate(("aircraft", "dtd"))
        }
        checkpoint.unify(home / "base", tasks, home / "state")
        checkpoint.extract(home / "state", "dtd", home / "expert", base=home / "base")

        base = load(home / "base")
        in_memory = cx.unify({task: load(where) for task, where in tasks.items()}, base)
        expected = cx.decouple(in_memory, "dtd", base)
        found = load(home / "expert")
        assert found.keys() == base.keys()
        assert all(torch.equal(found[n], expected[n]) for n in expected)
        files = {p.name for p in (home / "base").iterdir()}
        assert {p.name for p in (home / "expert").iterdir()} == files

        model, notes = kind.from_pretrained(home / "expert", output_loading_info=True)
        assert not notes["missing_keys"]
        assert not notes["unexpected_keys"]
        assert model.dtype == torch.bfloat16
        parameters = sorted(float(p.detach().double().abs().sum()) for p in model.parameters())
        tensors = sorted(float(t.double().abs().sum()) for t in expected.values())
        assert parameters == tensors  # whatever the library names them
    AutoTokenizer.from_pretrained(tmp_path / "llama" / "expert")
    AutoProcessor.from_pretrained(tmp_path / "llava" / "expert")


def test_tied_weights_are_fused_once(tmp_path: Path) -> None:
    tiny_models.llama(tmp_path / "base", seed=0, tied=True)
    tuned = tiny_models.finetuned(tmp_path / "base", tmp_path / "a", seed=1)
    checkpoint.unify(tmp_path / "base", {"a": tuned}, tmp_path / "state")
    checkpoint.extract(tmp_path / "state", "a", tmp_path / "expert", base=tmp_path / "base")
    assert "lm_head.weight" not in cx.UnifiedDelta.load(tmp_path / "state").delta
    model = LlamaForCausalLM.from_pretrained(tmp_path / "expert")
    assert model.lm_head.weight is model.model.embed_tokens.weight
    expected = load(tmp_path / "a")["model.embed_tokens.weight"]
    assert torch.allclose(model.lm_head.weight, expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("pickled", [False, True])
def test_an_open_clip_model(tmp_path: Path, pickled: bool) -> None:
    suffix = "pt" if pickled else "safetensors"
    base, options = tmp_path / f"base.{suffix}", Options(allow_pickle=pickled)
    models: dict[str, CLIP] = {}
    for seed, name in enumerate(("base", "a", "b")):
        models[name] = tiny_models.clip(tmp_path / f"{name}.{suffix}", seed=seed)
    tasks = {task: tmp_path / f"{task}.{suffix}" for task in ("a", "b")}
    checkpoint.unify(base, tasks, tmp_path / "state", options=options)
    checkpoint.extract(
        tmp_path / "state", "a", tmp_path / "a-again.safetensors", base=base, options=options
    )
    state = cx.unify(
        {task: models[task].state_dict() for task in tasks}, models["base"].state_dict()
    )
    expected = cx.decouple(state, "a", models["base"].state_dict())
    loaded = CLIP(**tiny_models.OPEN_CLIP)
    open_clip.load_checkpoint(loaded, str(tmp_path / "a-again.safetensors"))
    for name, tensor in loaded.state_dict().items():
        assert torch.equal(tensor, expected[name]), name


def adapter(folder: Path, base: Path, seed: int) -> PeftModel:
    """Save a LoRA adapter of a model in a folder."""
    model = LlamaForCausalLM.from_pretrained(base)
    adapted = get_peft_model(model, LoraConfig(r=4, target_modules=["q_proj", "down_proj"]))
    torch.manual_seed(seed)
    for name, parameter in adapted.named_parameters():
        if "lora_" in name:
            nn.init.normal_(parameter, std=0.05)
    adapted.save_pretrained(folder)
    return adapted


def merged(model: PeftModel) -> dict[str, Tensor]:
    return {n: t for n, t in model.merge_and_unload().state_dict().items() if "rotary" not in n}


def test_adapters_beside_whole_models(tmp_path: Path) -> None:
    tiny_models.llama(tmp_path / "base", seed=0)
    whole = tiny_models.finetuned(tmp_path / "base", tmp_path / "whole", seed=1)
    experts = {
        name: merged(adapter(tmp_path / name, tmp_path / "base", seed))
        for seed, name in enumerate(("first", "second"))
    }
    tasks = {"first": tmp_path / "first", "whole": whole}
    checkpoint.unify(tmp_path / "base", tasks, tmp_path / "state")
    base = load(tmp_path / "base")
    state = cx.unify({"first": {n: experts["first"][n] for n in base}, "whole": load(whole)}, base)
    assert_close(tmp_path / "state", state)
    checkpoint.absorb(tmp_path / "state", "second", tmp_path / "second", base=tmp_path / "base")
    state = cx.absorb(state, "second", {n: experts["second"][n] for n in base}, base)
    assert_close(tmp_path / "state", state)


def assert_close(found: Path, expected: cx.UnifiedDelta) -> None:
    """Equal but for the rounding of PEFT's merged weights, which are not exact differences."""
    state = cx.UnifiedDelta.load(found)
    assert state.tasks == expected.tasks
    for task in state.tasks:
        assert state.rescaler(task) == pytest.approx(expected.rescaler(task), rel=1e-4)
    for name, delta in expected.delta.items():
        unlike = (state.delta[name] - delta).abs() > 1e-6
        assert int(unlike.sum()) <= 2, name  # where total is nearly 0


def test_one_adapter_comes_back_exactly(tmp_path: Path) -> None:
    tiny_models.llama(tmp_path / "base", seed=0)
    model = adapter(tmp_path / "lora", tmp_path / "base", 3)
    checkpoint.unify(tmp_path / "base", {"a": tmp_path / "lora"}, tmp_path / "state")
    state = cx.UnifiedDelta.load(tmp_path / "state")
    assert state.rescaler("a") == 1
    untouched = [name for name, delta in state.delta.items() if not delta.any()]
    assert "model.embed_tokens.weight" in untouched
    shutil.rmtree(tmp_path / "lora")
    checkpoint.extract(tmp_path / "state", "a", tmp_path / "expert", base=tmp_path / "base")
    expected = merged(model)
    for name, tensor in load(tmp_path / "expert").items():
        assert torch.allclose(tensor, expected[name], rtol=0, atol=1e-7), name


def test_an_adapter_is_no_base(tmp_path: Path) -> None:
    tiny_models.llama(tmp_path / "base", seed=0)
    adapter(tmp_path / "lora", tmp_path / "base", 3)
    with pytest.raises(ValueError, match="is an adapter: the base is the model that it adapts"):
        checkpoint.unify(tmp_path / "lora", {"a": tmp_path / "base"}, tmp_path / "state")
    assert not (tmp_path / "state").exists()
