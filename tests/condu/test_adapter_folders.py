from __future__ import annotations

import copy
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel
from safetensors.torch import load_file, save_file
from saved_adapters import absorbed, condu, load, present, refused, save_tasks
from tiny_adapters import MODELS, adapted, answer, finetune, llama
from torch import Tensor

import condu_ext as cx
from condu import ConDU
from condu.adapters import absorb_adapter, extract_adapter
from condu.adapters.layers import output_projection_count

PRODUCTS = ["clip mlp", "clip attention", "patterns"]
SAVED = [*PRODUCTS, "fan-in-fan-out"]


@pytest.fixture(autouse=True)
def _here(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)


def assert_close(a: dict[str, Tensor], b: dict[str, Tensor]) -> None:
    assert a.keys() == b.keys()
    for name in a:
        torch.testing.assert_close(a[name], b[name], atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("kind", PRODUCTS)
def test_products_from_disk_are_those_of_the_live_model(kind: str) -> None:
    model = save_tasks(kind)
    assert condu("absorb-adapter", "state", "a", "--task", "a").exit_code == 0
    result = condu("absorb-adapter", "state", "b", "--task", "b")
    assert (result.exit_code, result.stderr) == (0, "")
    assert result.stdout == "state: task 'b' absorbed in the space of products; tasks: a, b\n"
    fusion = ConDU(model, space="product")
    for seed, task in enumerate("ab"):
        finetune(model, seed)
        fusion.absorb(task)
    found = cx.UnifiedDelta.load("state")
    for task in "ab":
        assert_close(cx.decouple(found, task, None), cx.decouple(fusion.state, task, None))


@pytest.mark.parametrize("kind", SAVED)
def test_factors_from_disk_are_those_of_the_live_model(kind: str) -> None:
    model = save_tasks(kind)
    for task in "ab":
        command = ("absorb-adapter", "state", task, "--task", task, "--init", "start")
        assert "in the space of factors" in condu(*command).stdout
    fusion = ConDU(model)
    for seed, task in enumerate("ab"):
        finetune(model, seed)
        fusion.absorb(task)
    found = cx.UnifiedDelta.load("state")
    for task in "ab":
        for name, delta in cx.decouple(fusion.state, task, None).items():
            assert torch.equal(cx.decouple(found, task, None)[name], delta)
    again = ConDU.from_pretrained("state", load(kind, "start"))  # and the live model goes on
    for task in "ab":
        with fusion.expert(task), again.expert(task) as expert:
            torch.testing.assert_close(answer(expert), answer(model))


def test_a_product_state_from_disk_serves_a_live_model_but_says_what_it_cannot_know() -> None:
    model = save_tasks("patterns")
    absorbed("a")
    expected = answer(load("patterns", "a"))
    with pytest.warns(UserWarning, match="no fingerprint of its base model"):
        fusion = ConDU.from_pretrained("state", model)
    with fusion.expert("a"):
        torch.testing.assert_close(answer(model), expected, atol=1e-5, rtol=1e-4)
    fusion.save_pretrained("state")  # now it knows
    absorbed("b")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert ConDU.from_pretrained("state", model).tasks == ("a", "b")
    with torch.no_grad():
        model.get_base_model().lm_head.weight += 1
    with pytest.raises(ValueError, match="weights under the adapter"):
        ConDU.from_pretrained("state", model)


@pytest.mark.parametrize("kind", SAVED)
def test_extracted_factors_answer_as_the_expert(kind: str) -> None:
    model = save_tasks(kind)
    absorbed("a", "b", init="start")
    command = ("extract-adapter", "state", "--task", "b", "-o", "out/b", "--init", "start")
    result = condu(*command)
    assert (result.exit_code, result.stdout) == (0, "out/b: the expert of task 'b'\n")
    with ConDU.from_pretrained("state", model).expert("b"):
        torch.testing.assert_close(answer(load(kind, "out/b")), answer(model))


@pytest.mark.parametrize("kind", PRODUCTS)
def test_extracted_products_of_full_rank_answer_as_the_expert(kind: str) -> None:
    model = save_tasks(kind)
    absorbed("a", "b")
    loss = extract_adapter("state", "b", "b16", svd_rank=17)  # of matrices of rank 16 at most
    assert loss is not None
    assert loss.total == loss.worst == 0.0
    with pytest.warns(UserWarning, match="fingerprint"):
        fusion = ConDU.from_pretrained("state", model)
    with fusion.expert("b"):
        torch.testing.assert_close(answer(load(kind, "b16")), answer(model), atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize("kind", ["patterns", "clip attention"])
def test_the_energy_that_a_low_rank_loses(kind: str) -> None:
    save_tasks(kind)
    state = absorbed("a", "b")
    result = condu("extract-adapter", "state", "--task", "b", "-o", "out", "--svd-rank", 2)
    assert result.exit_code == 0, result.output
    bare = dict(MODELS[kind][0]().named_parameters())
    merged = dict(load(kind, "out").merge_and_unload().named_parameters())
    lost, energy = {}, {}
    for name, delta in cx.decouple(state, "b", None).items():
        written = (merged[name] - bare[name]).detach()
        assert torch.linalg.matrix_rank(written, rtol=1e-4) <= 2
        lost[name] = (delta - written).square().sum().item()
        energy[name] = delta.square().sum().item()
    shares = {name: lost[name] / energy[name] for name in lost}
    worst = max(shares, key=lambda name: shares[name])
    total = sum(lost.values()) / sum(energy.values())
    assert 0 < total < shares[worst] < 1
    assert result.stdout.splitlines()[1:] == [
        "all weights are taken for those of linear layers and attentions",
        f"rank 2 leaves out {100 * total:.3g} % of the energy,"
        f" {100 * shares[worst]:.3g} % of {worst}, the worst",
    ]


def test_one_task_of_products_needs_its_own_rank_only() -> None:
    save_tasks("clip mlp")
    absorbed("a")
    loss = extract_adapter("state", "a", "out", svd_rank=4)
    assert loss is not None
    assert loss.worst < 1e-10
    torch.testing.assert_close(
        answer(load("clip mlp", "out")), answer(load("clip mlp", "a")), atol=1e-5, rtol=1e-4
    )


def test_only_the_layers_of_the_state_are_adapted() -> None:
    save_tasks("clip mlp", target_modules=r"transformer\.resblocks\.0\.mlp\.c_fc")  # not visual's
    absorbed("a")
    extract_adapter("state", "a", "out", svd_rank=4)
    names = [n for n, _ in load("clip mlp", "out").named_parameters() if "lora_A" in n]
    assert names == ["base_model.model.transformer.resblocks.0.mlp.c_fc.lora_A.default.weight"]


def test_16_bit_adapters_are_multiplied_in_fp32_from_disk() -> None:
    save_tasks("patterns")
    factors = {n: t.bfloat16() for n, t in load_file("a/adapter_model.safetensors").items()}
    save_file(factors, "a/adapter_model.safetensors")
    layer = "model.layers.0.mlp.down_proj"
    a, b = (factors[f"base_model.model.{layer}.lora_{x}.weight"].double() for x in "AB")
    delta = cx.decouple(absorbed("a"), "a", None)[f"{layer}.weight"]
    torch.testing.assert_close(delta.double(), b @ a * (5 / 2), atol=1e-6, rtol=1e-5)


def test_factors_of_embeddings() -> None:
    model = save_tasks("convolutions", target_modules=["embed"])
    absorbed("a", "b", init="start")
    extract_adapter("state", "b", "out", init="start")
    with ConDU.from_pretrained("state", model).expert("b"):
        torch.testing.assert_close(answer(load("convolutions", "out")), answer(model))


@pytest.mark.parametrize("space", ["factors", "product"])
def test_live_and_disk_meet_where_transformers_adds_the_adapter(space: Any) -> None:
    model = llama()
    model.add_adapter(LoraConfig(r=2, target_modules=["q_proj"]))
    model.save_pretrained("start")
    init = "start" if space == "factors" else None
    fusion = ConDU(model, space=space)
    finetune(model, 0)
    fusion.absorb("a")
    finetune(model, 1)
    model.save_pretrained("b")
    fusion.reset()
    fusion.save_pretrained("state")
    assert absorbed("b", init=init).tasks == ("a", "b")
    extract_adapter("state", "b", "out", init=init, svd_rank=None if init else 16)
    with ConDU.from_pretrained("state", model).expert("b"):
        expert = PeftModel.from_pretrained(llama(), "out")
        torch.testing.assert_close(answer(expert), answer(model), atol=1e-5, rtol=1e-4)


def test_extraction_refuses_what_cannot_be_and_leaves_nothing() -> None:
    save_tasks("clip mlp")
    absorbed("a")
    absorb_adapter("factors", "a", "a", init="start")

    def line(*arguments: object) -> str:
        return refused("extract-adapter", *arguments, "--task", "a", "-o", "out")

    assert "svd_rank must say" in line("state")
    assert "svd_rank must say" in line("state", "--svd-rank", 0)
    assert "leave init out" in line("state", "--svd-rank", 2, "--init", "start")
    assert "init must name" in line("factors")
    assert "leave svd_rank out" in line("factors", "--init", "start", "--svd-rank", 2)
    assert "differs from the base model" in line("factors", "--init", "a")
    assert "holds no unified checkpoint" in line("nothing")
    unknown = refused("extract-adapter", "state", "--task", "x", "-o", "out", "--svd-rank", "2")
    assert "unknown task 'x'" in unknown
    assert present() == ["a", "b", "factors", "start", "state"]
    Path("out").mkdir()
    assert "out exists" in line("state", "--svd-rank", 2)


def test_extraction_on_a_full_disk_leaves_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    save_tasks("clip mlp")
    absorbed("a")

    def full(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("condu.adapters.extract.save_file", full)
    assert "No space left" in refused(
        "extract-adapter", "state", "--task", "a", "-o", "out", "--svd-rank", 2
    )
    assert present() == ["a", "b", "start", "state"]


def test_peft_adds_an_attention_s_output_projection_so_often() -> None:
    model = adapted("clip attention")
    finetune(model, 0)
    attention = model.get_base_model().transformer.resblocks[0].attn
    projection = attention.base_layer.out_proj
    weight = projection.get_base_layer().weight.detach().clone()
    change = projection.get_delta_weight("default").detach()
    merged = copy.deepcopy(model).merge_and_unload().transformer.resblocks[0].attn.out_proj.weight
    torch.testing.assert_close(merged, weight + output_projection_count() * change)
