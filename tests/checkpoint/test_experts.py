"""What a task's expert is written as: the order of its tensors, and what lies beside them."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from apart import together
from peft import LoraConfig, get_peft_model
from range_models import load, model, moved, save
from tiny_models import llava
from torch import Tensor
from transformers import LlavaForConditionalGeneration

from condu import checkpoint
from condu.checkpoint import Options, extracting
from condu.checkpoint.dcp import write_dcp
from condu.checkpoint.tensor_files import read_header

WORDS = ("kiwi", "fig", "plum", "lime", "pear", "date", "nut", "sloe")
HEADS = [f"head.{word}.weight" for word in WORDS]


@pytest.fixture
def headed(tmp_path: Path) -> dict[str, Tensor]:
    """A state of task "a", which has heads that the base lacks; its fine-tuned model."""
    base = model(0)
    tuned = moved(base, 1) | {name: torch.randn(k, 3) for k, name in enumerate(HEADS)}
    checkpoint.unify(
        save(base, tmp_path / "base.safetensors"),
        {"a": save(tuned, tmp_path / "a.safetensors")},
        tmp_path / "state",
        private=["head.*"],
    )
    return tuned


def extract(folder: Path, out: Path) -> None:
    checkpoint.extract(folder / "state", "a", out, base=folder / "base.safetensors")


def test_heads_that_the_base_lacks(tmp_path: Path, headed: dict[str, Tensor]) -> None:
    extract(tmp_path, tmp_path / "expert")
    expert = load(tmp_path / "expert")
    assert expert.keys() == headed.keys()
    for name in HEADS:
        assert torch.equal(expert[name], headed[name])
    # in the order of their file, which every process of a run sees, whatever it hashes names to
    (private,) = (tmp_path / "state").glob("private-*")
    (written,) = (tmp_path / "expert").glob("*.safetensors")
    heads = [name for name in read_header(written) if name in HEADS and headed[name].numel()]
    assert heads == [name for name in read_header(private) if headed[name].numel()]


def extract_in_another_order(folder: Path) -> None:
    """A command of several processes, of which one would put tensors elsewhere."""
    if torch.distributed.get_rank() == 1:
        entries = extracting._entries

        def turned(*arguments: Any) -> Any:
            found, shards = entries(*arguments)
            return found, [shard[::-1] for shard in shards]

        extracting._entries = turned
    extract(folder, folder / "expert")


def test_processes_agree_on_the_layout(tmp_path: Path, headed: dict[str, Tensor]) -> None:
    before = sorted(tmp_path.iterdir())
    for end in together(2, extract_in_another_order, tmp_path):
        assert isinstance(end.error, ValueError)
        assert "the layout of the model" in str(end.error)
    assert sorted(tmp_path.iterdir()) == before


def hugging_face(base: Path, kind: str) -> Path:
    """The same model as other programs leave it: beside its files, but not in safetensors."""
    folder = Path(shutil.copytree(base, base.with_name(kind)))
    if kind == "dcp":
        write_dcp(folder)
        return folder
    torch.save(load(folder), folder / "pytorch_model.bin")
    for file in (*folder.glob("*.safetensors"), folder / "model.safetensors.index.json"):
        file.unlink()
    return folder


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
@pytest.mark.parametrize("kind", ["bin", "dcp"])
def test_what_belongs_to_a_base_of_another_format(tmp_path: Path, kind: str) -> None:
    """Configuration, processor, and the names that transformers knows weights by."""
    model = llava(tmp_path / "hf", seed=0)
    adapted = get_peft_model(model, LoraConfig(target_modules=["q_proj"], init_lora_weights=False))
    adapted.save_pretrained(tmp_path / "lora")
    base, options = hugging_face(tmp_path / "hf", kind), Options(allow_pickle=True)
    checkpoint.unify(base, {"a": tmp_path / "lora"}, tmp_path / "state", options=options)
    checkpoint.extract(tmp_path / "state", "a", tmp_path / "out", base=base, options=options)
    texts = {p.name for p in (tmp_path / "hf").iterdir() if ".safetensors" not in p.name}
    assert {"config.json", "tokenizer.json", "processor_config.json"} <= texts
    assert {p.name for p in (tmp_path / "out").iterdir()} == texts | {"model.safetensors"}
    found = LlavaForConditionalGeneration.from_pretrained(tmp_path / "out").state_dict()
    for name, expected in adapted.merge_and_unload().state_dict().items():
        assert torch.allclose(found[name], expected, atol=1e-6), name
