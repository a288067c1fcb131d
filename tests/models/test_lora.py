from __future__ import annotations

import math

import open_clip
import pytest
import torch
from torch import nn

from condu.models import load_clip
from condu.models.lora import add_lora


@pytest.fixture
def mini():
    return load_clip("mini")


def answers(model, mini):
    torch.manual_seed(3)
    images = torch.randn(2, 3, 32, 32)
    texts = mini.tokenize(["a star", "a red circle"])
    return torch.cat([model.encode_image(images), model.encode_text(texts)])


@pytest.mark.parametrize("targets", [("c_fc", "c_proj"), ("attn",), ("mlp.c_fc", "attn")])
def test_every_factor_in_both_towers_is_trained(mini, targets):
    before = answers(mini.model, mini).detach()
    frozen = {name: p.detach().clone() for name, p in mini.model.named_parameters()}
    model = add_lora(mini.model, rank=2, targets=targets)
    torch.testing.assert_close(answers(model, mini), before)
    factors = {name: p for name, p in model.named_parameters() if p.requires_grad}
    layers = 6 * (len(targets) + ("attn" in targets))  # attn: input and output projections
    assert len(factors) == 2 * layers
    assert all("lora_A" in name or "lora_B" in name for name in factors)
    with torch.no_grad():  # a B of zeros gives no gradient to A
        for name, factor in factors.items():
            if "lora_B" in name:
                factor.normal_(std=0.1)
    changed = answers(model, mini)
    changed.square().sum().backward()
    assert all(factor.grad is not None and factor.grad.any() for factor in factors.values())
    assert (changed[:2] - before[:2]).abs().max() > 1e-3
    assert (changed[2:] - before[2:]).abs().max() > 1e-3
    for name, p in model.get_base_model().named_parameters():
        if "lora_" not in name:
            assert not p.requires_grad
            torch.testing.assert_close(p, frozen[name.replace("base_layer.", "")])


def test_the_base_parameters_are_the_model_s_own_tensors(mini):
    own = {p.data_ptr() for p in mini.model.parameters()}
    model = add_lora(mini.model, rank=2, targets=("c_fc", "attn"))
    assert own == {p.data_ptr() for p in model.parameters() if not p.requires_grad}


def test_scale_and_shapes():
    layers = nn.Sequential(nn.Linear(3, 5, bias=False))
    model = add_lora(layers, rank=4, targets=("0",))
    x = torch.randn(2, 3)
    weight = layers[0].base_layer.weight.detach()
    a, b = layers[0].lora_A["default"].weight, layers[0].lora_B["default"].weight
    assert a.shape == (4, 3)
    assert b.shape == (5, 4)
    with torch.no_grad():
        b.normal_()
    torch.testing.assert_close(model(x), x @ (weight + b @ a / math.sqrt(4)).T)


def test_the_seed_alone_decides_the_start_and_the_generator_stays(mini):
    def start(seed, generator):
        model = load_clip("mini").model
        torch.manual_seed(generator)
        state = torch.get_rng_state()
        adapted = add_lora(model, rank=2, seed=seed)
        assert torch.equal(torch.get_rng_state(), state)
        return torch.cat([p.flatten() for p in adapted.parameters() if p.requires_grad])

    assert torch.equal(start(1, 7), start(1, 8))
    assert not torch.equal(start(1, 7), start(2, 7))


def test_hugging_face_models_are_adapted_alike():
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=20,
        hidden_size=8,
        intermediate_size=12,
        num_hidden_layers=2,
        num_attention_heads=2,
    )
    model = add_lora(LlamaForCausalLM(config), rank=2, targets=("q_proj", "down_proj"))
    tokens = torch.tensor([[1, 2, 3]])
    model(input_ids=tokens, labels=tokens).loss.backward()
    trained = [p for p in model.parameters() if p.requires_grad]
    assert len(trained) == 2 * 2 * 2
    assert all(p.grad is not None for p in trained)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rank": 0}, "rank must be at least 1, got 0"),
        ({"rank": 2, "targets": ("c_fc", "q_proj")}, "'q_proj' matches no module"),
        ({"rank": 2, "targets": ()}, "targets is empty"),
        ({"rank": 2, "targets": ("attn", "ln_2")}, r"'visual.*ln_2', a LayerNorm, for which"),
        (
            {"rank": 2, "targets": ("c_fc", "out_proj")},
            r"'out_proj' matches 'visual.transformer.resblocks.0.attn.out_proj'.*target 'attn'",
        ),
    ],
)
def test_bad_use_is_named_and_changes_nothing(mini, options, message):
    before = set(mini.model.state_dict())
    with pytest.raises(ValueError, match=message):
        add_lora(mini.model, **options)
    assert set(mini.model.state_dict()) == before
    assert all(p.requires_grad for p in mini.model.parameters())


def test_a_string_of_targets_and_a_second_adapter_are_refused(mini):
    with pytest.raises(TypeError, match="'c_fc'"):
        add_lora(mini.model, rank=2, targets="c_fc")
    model = add_lora(mini.model, rank=2)
    with pytest.raises(ValueError, match="carries adapters already"):
        add_lora(model, rank=2)


def test_the_attention_pool_of_a_resnet_clip_is_refused():
    model = open_clip.model.CLIP(
        embed_dim=32,
        vision_cfg={"layers": [1, 1, 1, 1], "width": 8, "image_size": 64},
        text_cfg={"context_length": 8, "vocab_size": 10, "width": 32, "heads": 2, "layers": 1},
    )
    with pytest.raises(ValueError, match=r"'c_proj'.*'visual.attnpool.c_proj'.*'mlp.c_proj'"):
        add_lora(model, rank=2)
    add_lora(model, rank=2, targets=("c_fc", "mlp.c_proj"))
