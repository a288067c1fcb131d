from __future__ import annotations

import copy
import dataclasses
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoHaConfig, LoraConfig, get_peft_model, get_peft_model_state_dict
from peft.tuners.lora import LoraLayer
from tiny_adapters import MODELS, adapted, answer, base_weights, clip, finetune, llama
from torch import Tensor, nn

import condu_ext as cx
from condu import ConDU

SPACES: Any = ["factors", "product"]


def factors(model: nn.Module) -> dict[str, Tensor]:
    return {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}


def assert_equal(a: dict[str, Tensor], b: dict[str, Tensor]) -> None:
    assert a.keys() == b.keys()
    for name in a:
        assert torch.equal(a[name], b[name]), name


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("space", SPACES)
def test_one_expert_is_what_peft_merges(kind: str, space: Any) -> None:
    model = adapted(kind)
    base, start, before = base_weights(model), factors(model), answer(model)
    fusion = ConDU(model, space=space)
    finetune(model, 1)
    products = {
        name.removeprefix("base_model.model."): layer.get_delta_weight("default")
        for name, layer in model.named_modules()
        if isinstance(layer, LoraLayer) and "attn" not in name
    }
    merged = copy.deepcopy(model).merge_and_unload()
    assert not torch.allclose(answer(merged), before, atol=1e-3)
    fusion.absorb("one")
    assert_equal(base_weights(model), base)
    assert_equal(factors(model), start)

    with fusion.expert("one") as expert:
        torch.testing.assert_close(answer(expert), answer(merged), atol=1e-5, rtol=1e-4)
        layers = [layer for layer in model.modules() if isinstance(layer, LoraLayer)]
        assert all(layer.disable_adapters == (space == "product") for layer in layers)
        if space == "product":
            weights = dict(merged.named_parameters())
            theta = cx.decouple(fusion.state, "one", fusion.pretrained)
            for name in fusion.state.delta:
                torch.testing.assert_close(theta[name], weights[name], atol=1e-6, rtol=1e-5)
            assert fusion.state.rescaler("one") == 1.0
            d = cx.decouple(fusion.state, "one", None)
            assert all(torch.equal(d[f"{name}.weight"], products[name]) for name in products)
        else:
            unloaded = copy.deepcopy(model).merge_and_unload()
            torch.testing.assert_close(answer(unloaded), answer(merged), atol=1e-5, rtol=1e-4)
    assert not any(layer.disable_adapters for layer in layers)
    assert_equal(base_weights(model), base)
    assert_equal(factors(model), start)
    torch.testing.assert_close(answer(model), before)


@pytest.mark.parametrize("kind", ["clip attention", "patterns"])
def test_product_experts_are_the_tensor_level_s(kind: str) -> None:
    model = adapted(kind)
    bare = {n: p.detach().clone() for n, p in MODELS[kind][0]().named_parameters()}
    fusion = ConDU(model, space="product")
    expected = cx.UnifiedDelta.empty(fusion.pretrained)
    for seed, task in enumerate("abc"):
        finetune(model, seed)
        merged = dict(copy.deepcopy(model).merge_and_unload().named_parameters())
        delta = {n: merged[n].detach() - bare[n] for n in fusion.state.delta}
        expected = cx.absorb(expected, task, delta, None)
        fusion.absorb(task)
    for task in "abc":
        mine, theirs = fusion.state.mask(task), expected.mask(task)
        with fusion.expert(task):
            live = {n.replace(".base_layer", ""): p for n, p in model.named_parameters()}
            for name, d in cx.decouple(expected, task, None).items():
                # W_0 + ΔW − W_0 is ΔW but for rounding, which may decide a near-tie otherwise
                same = mine[name] == theirs[name]
                assert same.float().mean() > 0.99
                weight = live[f"base_model.model.{name}"].detach()
                torch.testing.assert_close(
                    weight[same], (bare[name] + d)[same], atol=1e-5, rtol=1e-4
                )


def test_factor_experts_are_the_tensor_level_s() -> None:
    model = adapted("clip attention")
    fusion = ConDU(model)
    start = factors(model)
    state = cx.UnifiedDelta.empty(start)
    for seed, task in enumerate("ab"):
        finetune(model, seed)
        state = cx.absorb(state, task, factors(model), start)
        fusion.absorb(task)
    for task in "ab":
        with fusion.expert(task):
            assert_equal(factors(model), cx.decouple(state, task, start))


@pytest.mark.parametrize("space", SPACES)
def test_names_in_the_state(space: Any) -> None:
    model = adapted("clip attention")
    names = set(ConDU(model, space=space).state.delta)
    if space == "factors":
        assert names == set(get_peft_model_state_dict(model))
    else:
        weights = {n for n in dict(clip().named_parameters()) if "attn" in n or "c_fc" in n}
        assert names == {n for n in weights if n.endswith("weight")}


@pytest.mark.parametrize("space", SPACES)
def test_attention_leaves_no_rounding_in_the_base(space: Any) -> None:
    model = adapted("clip attention")
    base = base_weights(model)
    fusion = ConDU(model, space=space)
    finetune(model, 0)
    for _ in range(5):
        answer(model)
    drifted = base_weights(model)
    assert any(not torch.equal(base[n], drifted[n]) for n in base)  # PEFT adds and takes away
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # of lost changes, for none is
        fusion.absorb("a")
    assert_equal(base_weights(model), base)
    with fusion.expert("a"):
        answer(model)
    assert_equal(base_weights(model), base)


def test_product_keeps_batch_statistics_per_task() -> None:
    model = adapted("convolutions")
    fusion = ConDU(model, space="product")
    model.train()
    model(torch.tensor([[1, 2, 3, 4]]))
    mean = model.get_base_model().norm.running_mean.clone()
    assert mean.any()
    finetune(model, 0)
    fusion.absorb("a")
    assert not model.get_base_model().norm.running_mean.any()
    with fusion.expert("a"):
        assert torch.equal(model.get_base_model().norm.running_mean, mean)


def test_trainable_flags_and_other_adapters_stay() -> None:
    model = adapted("patterns")
    model.add_adapter("other", model.peft_config["default"])
    for name, parameter in model.named_parameters():
        if "lora_A" in name:
            parameter.requires_grad_(False)
    flags = {n: p.requires_grad for n, p in model.named_parameters()}
    others = {n: p.clone() for n, p in model.named_parameters() if ".other." in n}
    fusion = ConDU(model, space="product")
    finetune(model, 0)
    fusion.absorb("a")
    with fusion.expert("a"):
        assert {n: p.requires_grad for n, p in model.named_parameters()} == flags
    assert {n: p.requires_grad for n, p in model.named_parameters()} == flags
    assert_equal({n: p for n, p in model.named_parameters() if ".other." in n}, others)
    assert all(".other" not in n for n in ConDU(model).state.delta)
    assert all("lora_B" in n for n in ConDU(model).state.delta)  # what is trainable


def test_16_bit_adapters_are_multiplied_in_fp32() -> None:
    model = adapted("patterns").to(torch.bfloat16)
    fusion = ConDU(model, space="product")
    finetune(model, 0)
    layer = model.get_base_model().model.layers[0].mlp.down_proj
    a, b = (f["default"].weight.detach().double() for f in (layer.lora_A, layer.lora_B))
    fusion.absorb("a")
    d = cx.decouple(fusion.state, "a", None)["model.layers.0.mlp.down_proj.weight"]
    torch.testing.assert_close(d.double(), b @ a * (5 / 2), atol=1e-7, rtol=1e-5)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}


@pytest.mark.parametrize("kind", ["clip attention", "patterns"])
@pytest.mark.parametrize("space", SPACES)
def test_save_and_load(kind: str, space: Any, tmp_path: Path) -> None:
    model = adapted(kind)
    fusion = ConDU(model, space=space)
    for seed, task in enumerate("ab"):
        finetune(model, seed)
        fusion.absorb(task)
    with fusion.expert("b"):
        expected = answer(model)
        fusion.save_pretrained(tmp_path / "state")  # while other weights are in place
    fresh = adapted(kind)
    wrapped = nn.ModuleDict({"module": fresh})  # named as DistributedDataParallel names its model
    again = ConDU.from_pretrained(tmp_path / "state", wrapped)
    assert again.tasks == ("a", "b")
    with again.expert("b"):
        torch.testing.assert_close(answer(fresh), expected)
    for each, live in ((fusion, model), (again, fresh)):
        finetune(live, 7)
        each.absorb("c")
    assert_equal(fusion.state.delta, again.state.delta)


@pytest.mark.parametrize("space", SPACES)
def test_adapters_that_transformers_adds_itself(space: Any) -> None:
    model = llama()
    model.add_adapter(LoraConfig(r=2, target_modules=["q_proj"]))
    fusion = ConDU(model, space=space)
    finetune(model, 0)
    expected = answer(model)
    fusion.absorb("a")
    assert not torch.allclose(answer(model), expected, atol=1e-4)
    with fusion.expert("a"):
        torch.testing.assert_close(answer(model), expected, atol=1e-5, rtol=1e-4)
    ends = ["lora_A.weight", "lora_B.weight"] if space == "factors" else ["weight"]
    prefix = "base_model.model." if space == "factors" else ""
    assert set(fusion.state.delta) == {
        f"{prefix}model.layers.{layer}.self_attn.q_proj.{end}" for layer in (0, 1) for end in ends
    }


@pytest.mark.parametrize("space", SPACES)
def test_an_adapter_replaced_by_another_is_noticed(space: Any) -> None:
    model = adapted("patterns")
    fusion = ConDU(model, space=space)
    config = copy.copy(model.peft_config["default"])
    for change, message in (
        ({"target_modules": {"q_proj", "v_proj", "down_proj", "up_proj"}}, "up_proj"),
        ({"target_modules": {"q_proj", "v_proj"}}, "down_proj"),
        ({"r": 5}, r"shape \[5, 16\]"),
    ):
        model.delete_adapter("default")
        model.add_adapter("default", dataclasses.replace(config, **change))
        model.set_adapter("default")
        with pytest.raises((RuntimeError, ValueError), match=message):
            fusion.absorb("a")


def test_importing_condu_does_not_import_peft() -> None:
    program = (
        "import condu, condu.cli, sys; assert not {'peft', 'transformers'} & sys.modules.keys()"
    )
    subprocess.run([sys.executable, "-c", program], check=True)


def test_a_product_state_serves_the_model_without_adapters(tmp_path: Path) -> None:
    model = adapted("patterns")
    fusion = ConDU(model, space="product")
    finetune(model, 0)
    fusion.absorb("a")
    fusion.save_pretrained(tmp_path / "state")
    plain = llama()
    with fusion.expert("a"), ConDU.from_pretrained(tmp_path / "state", plain).expert("a"):
        torch.testing.assert_close(answer(plain), answer(model))


@pytest.mark.parametrize("space", SPACES)
def test_loading_refuses_what_is_not_the_state_s(space: Any, tmp_path: Path) -> None:
    model = adapted("clip mlp")
    fusion = ConDU(model, space=space)
    finetune(model, 0)
    fusion.absorb("a")
    fusion.save_pretrained(tmp_path / "state")

    def load(model: nn.Module) -> None:
        ConDU.from_pretrained(tmp_path / "state", model)

    with pytest.raises(ValueError, match=r"mlp\.c_proj.*other target_modules"):
        load(adapted("clip mlp", target_modules=["c_fc"]))
    with pytest.raises(ValueError, match=r"attn.*other target_modules"):
        load(adapted("clip mlp", target_modules=["c_fc", "c_proj", "attn"]))
    other = adapted("clip mlp")
    with torch.no_grad():
        other.get_base_model().ln_final.weight[0] += 1e-3
    with pytest.raises(ValueError, match="weights under the adapter"):
        load(other)
    with torch.no_grad():
        other.get_base_model().transformer.resblocks[0].mlp.c_fc.base_layer.weight[0, 0] += 1e-3
    with pytest.raises(ValueError, match=r"weights under|tensor 'transformer.resblocks.0.mlp.c_fc"):
        load(other)
    if space == "factors":
        with pytest.raises(ValueError, match=r"shape \(5, 16\).*state \(4, 16\).*another rank"):
            load(adapted("clip mlp", r=5))
        with pytest.raises(ValueError, match="its scale"):
            load(adapted("clip mlp", lora_alpha=3))
        with pytest.raises(ValueError, match=r"lora_A\.weight.*differs from the base"):
            load(adapted("clip mlp", seed=1))
        with pytest.raises(ValueError, match="LoRA factors, but the model carries no adapter"):
            load(clip())
    else:
        load(adapted("clip mlp", r=5, lora_alpha=3, seed=1))  # ΔW says it all


@pytest.mark.parametrize("space", SPACES)
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"use_dora": True}, r"layer '.*c_fc': DoRA"),
        ({"modules_to_save": ["token_embedding"]}, "token_embedding.*no factor of adapter"),
        ({"bias": "all"}, "bias.*no factor of adapter"),
        ({"lora_bias": True}, "lora_bias"),
        ({"init_lora_weights": False}, "B·A is not zero"),
        ({"init_lora_weights": "pissa"}, "B·A is not zero"),
    ],
)
def test_what_is_no_product_is_refused_by_name(options: Any, message: str, space: Any) -> None:
    model = adapted("clip mlp", **options)
    if space == "product" or "use_dora" in options:
        with pytest.raises(ValueError, match=message):
            ConDU(model, space=space)
        return
    fusion = ConDU(model)  # the factors are tensors like any others
    start = factors(model)
    assert set(fusion.state.delta) == set(get_peft_model_state_dict(model)) or "bias" in options
    finetune(model, 0)
    tuned = factors(model)
    fusion.absorb("a")
    assert_equal(factors(model), start)
    with fusion.expert("a"):
        for name, value in factors(model).items():
            torch.testing.assert_close(value, tuned[name])


def test_other_adapters_than_lora_are_refused_by_name() -> None:
    model = get_peft_model(clip(), LoHaConfig(r=2, target_modules=["c_fc"]))
    for space in SPACES:
        with pytest.raises(ValueError, match=r"c_fc'.*only LoRA"):
            ConDU(model, space=space)


def test_tied_weights_are_refused_in_the_product_space() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed = nn.Embedding(5, 3)
            self.head = nn.Linear(3, 5, bias=False)
            self.head.weight = self.embed.weight

    model = get_peft_model(Tied(), LoraConfig(r=1, target_modules=["head"]))
    with pytest.raises(ValueError, match=r"'embed.weight' and 'head.weight' are tied"):
        ConDU(model, space="product")


@pytest.mark.parametrize("space", SPACES)
def test_the_adapter_must_act_alone(space: Any) -> None:
    model = adapted("clip attention")
    model.add_adapter("other", model.peft_config["default"])
    fusion = ConDU(model, space=space)
    finetune(model, 0)
    live = factors(model)

    def refused(message: str) -> None:
        for call in (lambda: fusion.absorb("a"), lambda: ConDU(model, space=space)):
            with pytest.raises(RuntimeError, match=message):
                call()

    model.base_model.set_adapter(["default", "other"])
    refused("'default' and 'other'|'default' must be the active one")
    model.base_model.set_adapter("other")
    with pytest.raises(RuntimeError, match=r"'default' must be the active one, but 'other' is"):
        fusion.absorb("a")
    model.base_model.set_adapter("default")
    with model.disable_adapter():
        refused("'default' is disabled")
    model.merge_adapter()
    refused("'default' is merged.*unmerge_adapter")
    model.unmerge_adapter()
    assert_equal(factors(model), live)
    fusion.absorb("a")
    with pytest.raises(ValueError, match="task 'a' is already in the state"):
        fusion.absorb("a")


def test_an_adapter_without_training_and_bad_options() -> None:
    model = adapted("clip mlp")
    for space in SPACES:
        with pytest.raises(ValueError, match=r"leave out '.*c_fc.*target_modules"):
            ConDU(model, space=space, exclude=["*c_fc*"])
    with pytest.raises(ValueError, match="space must be 'factors' or 'product', got 'both'"):
        ConDU(model, space="both")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="carries no LoRA adapter"):
        ConDU(clip(), space="product")
    model.requires_grad_(False)
    for space in SPACES:
        with pytest.raises(ValueError, match=r"'default' has no trainable tensor"):
            ConDU(model, space=space)
