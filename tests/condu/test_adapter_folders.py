from __future__ import annotations

import copy
import json
import shutil
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from tiny_adapters import MODELS, adapted, answer, finetune
from torch import Tensor
from typer.testing import CliRunner, Result

import condu_ext as cx
from condu import ConDU
from condu.adapters import absorb_adapter, extract_adapter
from condu.adapters.layers import output_projection_count
from condu.cli import app

SAVED = ["clip mlp", "clip attention", "patterns", "fan-in-fan-out"]


@pytest.fixture(autouse=True)
def _here(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)


def condu(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def refused(*arguments: object) -> str:
    """The one line that a command wrote before it ended with status 2."""
    result = condu(*arguments)
    assert result.exit_code == 2, result.output
    assert result.stdout == ""
    (line,) = result.stderr.splitlines()
    return line


def save_tasks(kind: str, tasks: str = "ab", **options: Any) -> PeftModel:
    """Folders "start" and one for each task; the model is left at its start."""
    model = adapted(kind, **options)
    start = {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}
    model.save_pretrained("start")
    for seed, task in enumerate(tasks):
        finetune(model, seed)
        model.save_pretrained(task)
        model.load_state_dict(start, strict=False)
    return model


def absorbed(*tasks: str, init: str | None = None) -> cx.UnifiedDelta:
    for task in tasks:
        state = absorb_adapter("state", task, task, init=init)
    return state


def files(folder: str) -> dict[str, bytes]:
    return {f.name: f.read_bytes() for f in Path(folder).iterdir() if f.name != ".lock"}


def load(kind: str, folder: str) -> PeftModel:
    return PeftModel.from_pretrained(MODELS[kind][0](), folder)


def assert_close(a: dict[str, Tensor], b: dict[str, Tensor]) -> None:
    assert a.keys() == b.keys()
    for name in a:
        torch.testing.assert_close(a[name], b[name], atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("kind", SAVED)
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


@pytest.mark.parametrize("kind", ["clip mlp", "clip attention", "patterns"])
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


def test_the_energy_that_a_low_rank_loses() -> None:
    save_tasks("patterns")
    state = absorbed("a", "b")
    result = condu("extract-adapter", "state", "--task", "b", "-o", "out", "--svd-rank", 2)
    assert result.exit_code == 0, result.output
    factors = load_file("out/adapter_model.safetensors")
    lost, energy = {}, {}
    for name, delta in cx.decouple(state, "b", None).items():
        layer = f"base_model.model.{name.removesuffix('.weight')}"
        product = factors[f"{layer}.lora_B.weight"] @ factors[f"{layer}.lora_A.weight"]
        assert torch.linalg.matrix_rank(product) <= 2
        lost[name] = (delta - product).square().sum().item()
        energy[name] = delta.square().sum().item()
    shares = {name: lost[name] / energy[name] for name in lost}
    worst = max(shares, key=lambda name: shares[name])
    total = sum(lost.values()) / sum(energy.values())
    assert 0 < total < shares[worst] < 1
    assert result.stdout.splitlines()[1] == (
        f"rank 2 leaves out {100 * total:.3g} % of the energy,"
        f" {100 * shares[worst]:.3g} % of {worst}, the worst"
    )


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


def test_16_bit_adapters_and_embeddings() -> None:
    model = save_tasks("convolutions", target_modules=["embed"])
    factors = {n: t.bfloat16() for n, t in load_file("a/adapter_model.safetensors").items()}
    save_file(factors, "a/adapter_model.safetensors")
    a, b = (factors[f"base_model.model.embed.lora_embedding_{x}"].double() for x in "AB")
    state = absorbed("a")
    delta = cx.decouple(state, "a", None)["embed.weight"]
    torch.testing.assert_close(delta.double(), (b @ a).T, atol=1e-6, rtol=1e-5)  # 2 / 2 = 1
    assert delta.shape == model.get_base_model().embed.weight.shape


def change(folder: str, **values: Any) -> None:
    path = Path(folder, "adapter_config.json")
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda: shutil.rmtree("b"), "b holds no adapter"),
        (lambda: Path("b/adapter_model.safetensors").rename("b/adapter_model.bin"), "is a pickle"),
        (lambda: Path("b/adapter_model.safetensors").write_bytes(b"x" * 99), "adapter_model"),
        (lambda: Path("b/adapter_config.json").write_text("{"), "adapter_config.json"),
        (lambda: change("b", use_dora=True), "use_dora"),
        (lambda: change("b", peft_type="IA3"), "IA3"),
        (lambda: change("b", init_lora_weights="pissa_niter_4"), "'pissa_niter_4' changes"),
        (lambda: change("b", r=3), "has shape (4, 16), by adapter_config.json it is (3, 16)"),
        (lambda: change("b", base_model_name_or_path="other/base"), "'other/base'"),
    ],
)
def test_a_bad_folder_is_named_and_the_state_stays(damage: Any, message: str) -> None:
    save_tasks("clip mlp")
    change("a", base_model_name_or_path="one/base")
    absorbed("a")
    before = files("state")
    damage()
    assert message in refused("absorb-adapter", "state", "b", "--task", "b")
    assert files("state") == before
    if "other/base" not in message:
        assert message in refused("absorb-adapter", "new", "b", "--task", "b")
    assert not Path("new").exists()


@pytest.mark.parametrize("init", [None, "start"])
def test_adapters_that_do_not_fit_the_state(init: str | None) -> None:
    save_tasks("clip mlp")
    absorbed("a", init=init)
    before = files("state")
    option = [] if init is None else ["--init", init]

    def refused_b(*options: str) -> str:
        return refused("absorb-adapter", "state", "b", "--task", "b", *(options or option))

    assert "task 'a' is already" in refused("absorb-adapter", "state", "b", "--task", "a", *option)
    shutil.copytree("start", "first")
    if init is None:
        assert "leave init out" in refused_b("--init", "start")
    else:
        assert "init must name" in refused("absorb-adapter", "state", "b", "--task", "b")
        save_tasks("clip mlp", "b", seed=5)  # consistent with its own start, not with the state's
        assert "differs from the base model" in refused_b()
        shutil.rmtree("start")
        shutil.copytree("first", "start")
        change("b", lora_alpha=7)
        assert "scale 3.5 of" in refused_b()
    save_tasks("clip mlp", "b", target_modules=["c_fc"])
    assert "other target_modules" in refused_b(*([] if init is None else ["--init", "first"]))
    save_tasks("clip mlp", "b", r=5)
    if init is None:  # products know no rank
        assert condu("absorb-adapter", "state", "b", "--task", "b").exit_code == 0
        return
    assert "(5, 16), but in first (4, 16): another rank" in refused_b("--init", "first")
    assert files("state") == before


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
    assert sorted(p.name for p in Path().iterdir()) == ["a", "b", "factors", "start", "state"]
    Path("out").mkdir()
    assert "out exists" in line("state", "--svd-rank", 2)


def test_adapters_absorbed_at_once_are_all_there() -> None:
    save_tasks("clip mlp", "abcd")
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda task: absorb_adapter("state", task, task), "abcd"))
    assert set(cx.UnifiedDelta.load("state").tasks) == set("abcd")


def test_extraction_on_a_full_disk_leaves_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    save_tasks("clip mlp")
    absorbed("a")

    def full(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("condu.adapters.extract.save_file", full)
    assert "No space left" in refused(
        "extract-adapter", "state", "--task", "a", "-o", "out", "--svd-rank", 2
    )
    assert sorted(p.name for p in Path().iterdir()) == ["a", "b", "start", "state"]


def test_peft_adds_an_attention_s_output_projection_so_often() -> None:
    model = adapted("clip attention")
    finetune(model, 0)
    attention = model.get_base_model().transformer.resblocks[0].attn
    projection = attention.base_layer.out_proj
    weight = projection.get_base_layer().weight.detach().clone()
    change = projection.get_delta_weight("default").detach()
    merged = copy.deepcopy(model).merge_and_unload().transformer.resblocks[0].attn.out_proj.weight
    torch.testing.assert_close(merged, weight + output_projection_count() * change)
