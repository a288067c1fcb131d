from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from reading import assert_same_bits, values
from safetensors.torch import load_file, save_file
from tiny_models import clip, llama, llava
from torch import nn
from transformers import MixtralConfig, MixtralForCausalLM

from condu.adapters.folder import AdapterFolder
from condu.checkpoint import adapter_source
from condu.checkpoint.loaded_names import names_when_loaded
from condu.checkpoint.sources import Source, open_source

KINDS: dict[str, tuple[Any, dict[str, Any]]] = {
    "llama": (llama, {"target_modules": ["q_proj", "v_proj"], "r": 3, "lora_alpha": 5}),
    "patterns": (
        llama,
        {
            "target_modules": ["k_proj", "down_proj"],
            "r": 2,
            "use_rslora": True,
            "rank_pattern": {"down_proj": 5},
            "alpha_pattern": {"k_proj": 7},
        },
    ),
    "llava": (llava, {"target_modules": ["q_proj", "linear_1"], "r": 4}),
    "open_clip": (clip, {"target_modules": ["attn", "c_fc"], "r": 3}),
}


def saved(kind: str, tmp_path: Path) -> PeftModel:
    """A trained adapter in the folder "adapter" over a model of "base"."""
    make, config = KINDS[kind]
    bare = make(tmp_path / ("base.safetensors" if make is clip else "base"), seed=0)
    model = get_peft_model(bare, LoraConfig(**config))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
    model.save_pretrained(tmp_path / "adapter")
    return model


@pytest.mark.parametrize("kind", KINDS)
def test_an_adapter_is_what_it_adds_to_the_weights(tmp_path: Path, kind: str) -> None:
    model = saved(kind, tmp_path)
    source = open_source(tmp_path / "adapter")
    assert source.is_delta
    assert [file.name for file in source.files] == [
        "adapter_config.json",
        "adapter_model.safetensors",
    ]
    dense = AdapterFolder.read(tmp_path / "adapter").deltas()
    assert source.tensors.keys() == dense.keys()
    live = model.get_base_model().state_dict()
    before = {name.replace(".base_layer", ""): tensor.clone() for name, tensor in live.items()}
    after = model.merge_and_unload().state_dict()
    for name, expected in dense.items():
        found = values(source, name, 7)
        assert found.any()
        assert_close(found, expected)
        assert_close(before[name] + found, after[name])
    moved = {name for name, tensor in after.items() if not torch.equal(tensor, before[name])}
    assert source.tensors.keys() == moved


def assert_close(found: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_weights_are_named_as_in_the_files_of_the_base(tmp_path: Path, kind: str) -> None:
    model = saved(kind, tmp_path)
    base = open_source(next(tmp_path.glob("base*")))
    live = open_source(tmp_path / "adapter")
    source = open_source(tmp_path / "adapter", base=base)
    assert source.tensors.keys() <= base.tensors.keys()
    renamed = kind == "llava"
    assert (source.tensors.keys() != live.tensors.keys()) is renamed
    merged = model.merge_and_unload()
    if not hasattr(merged, "save_pretrained"):
        return
    merged.save_pretrained(tmp_path / "merged")
    after = open_source(tmp_path / "merged")
    for name in base.tensors:
        expected = values(after, name) - values(base, name)
        found = values(source, name) if name in source.tensors else torch.zeros(())
        torch.testing.assert_close(found.expand_as(expected), expected, atol=1e-6, rtol=1e-5)


def test_weights_that_transformers_joins_have_no_name_in_the_files(tmp_path: Path) -> None:
    config = MixtralConfig(
        vocab_size=12,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        num_local_experts=2,
    )
    model = MixtralForCausalLM(config)
    model.save_pretrained(tmp_path)
    stored = open_source(tmp_path)
    names = names_when_loaded(tmp_path, stored.tensors)
    joined = {name for name in model.state_dict() if ".experts." in name}
    assert joined
    assert names.keys() == model.state_dict().keys() - joined
    for live, name in names.items():
        assert_same_bits(values(stored, name), model.state_dict()[live])


def test_where_transformers_does_not_know_the_base_names_stay(tmp_path: Path) -> None:
    saved("llava", tmp_path)
    live = open_source(tmp_path / "adapter")
    config = tmp_path / "base" / "config.json"
    known = json.loads(config.read_text())
    unknown: list[dict[str, Any]] = [
        {**known, "model_type": "of_nobody"},
        {**known, "architectures": ["OfNobody"]},
        {**known, "architectures": None},
        {**known, "architectures": "LlavaForConditionalGeneration"},
        {**known, "architectures": ["pipeline"]},
        {**known, "architectures": [7]},
        {**known, "text_config": {**known["text_config"], "num_attention_heads": 0}},
        {**known, "text_config": {**known["text_config"], "hidden_size": "wide"}},
    ]
    for content in unknown:
        config.write_text(json.dumps(content))
        source = open_source(tmp_path / "adapter", base=open_source(tmp_path / "base"))
        assert source.tensors.keys() == live.tensors.keys()
    config.unlink()
    source = open_source(tmp_path / "adapter", base=open_source(tmp_path / "base"))
    assert source.tensors.keys() == live.tensors.keys()


def wide(tmp_path: Path, *, rank: int, rows: int, columns: int, dtype: torch.dtype) -> Source:
    """An adapter of one layer "w" with blocks of several rows."""
    model = get_peft_model(
        nn.ModuleDict({"w": nn.Linear(columns, rows, bias=False)}),
        LoraConfig(r=rank, target_modules=["w"]),
    )
    torch.manual_seed(0)
    for parameter in model.parameters():
        nn.init.normal_(parameter)
    model.to(dtype).save_pretrained(tmp_path)
    return open_source(tmp_path)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_bits_do_not_depend_on_ranges_or_threads(
    tmp_path: Path, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(adapter_source, "BLOCK", 1000)
    rows, columns = 93, 111  # blocks of 9 rows, the last one smaller
    source = wide(tmp_path, rank=17, rows=rows, columns=columns, dtype=dtype)
    factors = load_file(tmp_path / "adapter_model.safetensors")
    a, b = (next(t for n, t in factors.items() if f"lora_{x}" in n).double() for x in "AB")
    whole = values(source, "w.weight")
    torch.testing.assert_close(whole.double(), b @ a * 8 / 17, atol=1e-5, rtol=1e-5)
    generator = torch.Generator().manual_seed(0)
    cuts = torch.randint(0, rows * columns, (40,), generator=generator).sort().values
    assert_same_bits(values(source, "w.weight", *cuts.tolist()), whole)
    threads = torch.get_num_threads()
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            assert_same_bits(values(source, "w.weight", 1234), whole)
            assert torch.get_num_threads() == count
            with ThreadPoolExecutor(4) as pool:
                for found in pool.map(lambda _: values(source, "w.weight", 5000), range(8)):
                    assert_same_bits(found, whole)
    finally:
        torch.set_num_threads(threads)


def test_no_more_than_a_block_is_multiplied_at_once_by_one_thread(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(adapter_source, "BLOCK", 100)
    source = wide(tmp_path, rank=2, rows=50, columns=40, dtype=torch.float32)
    made: list[torch.Tensor] = []
    product = type(next(iter(source._products.values())))  # type: ignore[attr-defined]
    rows = product.rows

    def counted(*args: Any) -> torch.Tensor:
        assert torch.get_num_threads() == 1
        made.append(rows(*args))
        return made[-1]

    monkeypatch.setattr(product, "rows", counted)
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        values(source, "w.weight")
    finally:
        torch.set_num_threads(threads)
    assert {block.shape for block in made} == {(2, 40)}
    made.clear()
    source.read("w.weight", 79, 81, torch.empty(2))
    assert len(made) == 2
    wider = wide(tmp_path / "wider", rank=2, rows=3, columns=200, dtype=torch.float32)
    assert values(wider, "w.weight", 1, 399).all()


def test_what_is_no_product_is_refused(tmp_path: Path) -> None:
    saved("llama", tmp_path)
    folder = tmp_path / "adapter"
    weights = folder / "adapter_model.safetensors"
    factors = load_file(weights)
    save_file({**factors, "base_model.model.lm_head.weight": torch.ones(2, 2)}, weights)
    with pytest.raises(ValueError, match=r"'base_model\.model\.lm_head\.weight' is no factor"):
        open_source(folder)
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps({**config, "use_dora": True}))
    with pytest.raises(ValueError, match="use_dora"):
        open_source(folder)
    (folder / "adapter_config.json").write_text("{")
    with pytest.raises(ValueError, match=r"adapter_config\.json"):
        open_source(folder)
    weights.unlink()
    with pytest.raises(FileNotFoundError, match="holds no adapter"):
        open_source(folder)
