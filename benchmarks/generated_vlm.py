"""A vision-language model of 7 B parameters and three fine-tunes of it, with random weights, in
folders as `save_pretrained` writes them, for the guide in docs/checkpoints.md.

    python benchmarks/generated_vlm.py FOLDER

The architecture is LLaVA 1.5's (transformers' LlavaConfig as it stands: a CLIP ViT-L/14, a
projector, a Llama with 32 layers). Made file by file: no more than one of 2 GB is in memory. In the
fine-tunes all but the language model's middle layers moved; the files of those are links to the
base's, so that the four folders take 35 GB of disk. `--layers` makes a smaller language model.
"""

from __future__ import annotations

import argparse
import json
import os
import re
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor
from transformers import (
    CLIPImageProcessorPil,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)

TASKS = ("charts", "receipts", "forms")
FILE_BYTES = 2_000_000_000
LEVEL = 0.02  # standard deviation of weights
STEP = 4e-4  # and of what fine-tuning adds


def shapes(layers: int) -> tuple[LlavaConfig, dict[str, torch.Size]]:
    """The configuration, and every tensor's shape."""
    config = LlavaConfig(dtype="bfloat16")
    config.text_config.num_hidden_layers = layers
    with torch.device("meta"):
        model = LlavaForConditionalGeneration(config)
    return config, {name: t.shape for name, t in model.state_dict().items()}


def files(all_shapes: dict[str, torch.Size]) -> Iterator[dict[str, torch.Size]]:
    """The tensors of each file."""
    group: dict[str, torch.Size] = {}
    for name, shape in all_shapes.items():
        if group and 2 * (sum(s.numel() for s in group.values()) + shape.numel()) > FILE_BYTES:
            yield group
            group = {}
        group[name] = shape
    yield group


def values(shape: torch.Size, level: float, generator: torch.Generator) -> Tensor:
    """Random weights; large tensors repeat a block of 4 Mi elements, shifted."""
    numel = shape.numel()
    block = level * torch.randn(min(numel, 1 << 22), generator=generator)
    parts = [block.roll(k) for k in range(-(-numel // max(block.numel(), 1)))]
    return torch.cat(parts)[:numel].view(shape) if parts else torch.zeros(shape)


def is_frozen(group: dict[str, torch.Size], layers: int) -> bool:
    """Whether a file has nothing but middle layers of the language model."""
    found = [re.search(r"language_model\..*layers\.(\d+)\.", name) for name in group]
    numbers = [int(match[1]) for match in found if match]
    return len(numbers) == len(found) and min(numbers) >= 4 and max(numbers) < layers - 4


def write_processor(folder: Path) -> None:
    words = {f"w{k}": k for k in range(100)} | {"<unk>": 100, "<image>": 101}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    LlavaProcessor(
        image_processor=CLIPImageProcessorPil(),
        tokenizer=PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>"),
        patch_size=14,
    ).save_pretrained(folder)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n\n")[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--layers", type=int, default=32, help="of the language model")
    arguments = parser.parse_args()
    config, all_shapes = shapes(arguments.layers)
    groups = list(files(all_shapes))
    names = [f"model-{k:05}-of-{len(groups):05}.safetensors" for k in range(1, len(groups) + 1)]
    index = {
        "metadata": {"total_size": 2 * sum(shape.numel() for shape in all_shapes.values())},
        "weight_map": {
            name: file for file, group in zip(names, groups, strict=True) for name in group
        },
    }
    base = arguments.folder / "base"
    tasks = [arguments.folder / name for name in TASKS]
    for model in (base, *tasks):
        model.mkdir(parents=True)
        config.architectures = ["LlavaForConditionalGeneration"]
        config.save_pretrained(model)
        write_processor(model)
        (model / "model.safetensors.index.json").write_text(json.dumps(index, indent=2))
    for number, (file, group) in enumerate(zip(names, groups, strict=True)):
        generator = torch.Generator().manual_seed(number)
        tensors = {name: values(s, LEVEL, generator).bfloat16() for name, s in group.items()}
        save_file(tensors, base / file, metadata={"format": "pt"})
        del tensors
        for model in tasks:
            if is_frozen(group, arguments.layers):
                os.link(base / file, model / file)
                continue
            tuned = load_file(base / file)
            for name, tensor in tuned.items():
                tuned[name] = (tensor + values(tensor.shape, STEP, generator)).bfloat16()
            save_file(tuned, model / file, metadata={"format": "pt"})
            del tuned
    count = sum(shape.numel() for shape in all_shapes.values())
    print(f"{arguments.folder}: {count / 1e9:.2f} B parameters in {len(groups)} files")


if __name__ == "__main__":
    main()
