"""The mini VQA model: a LLaVA from ``assets/model.json`` with a tokenizer of whole words."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, models, normalizers, pre_tokenizers
from transformers import LlavaConfig, LlavaForConditionalGeneration, PreTrainedTokenizerFast

from condu.tasks.mini_vqa.questions import vocabulary

ASSETS = Path(__file__).parent / "assets"
WEIGHTS = ASSETS / "weights.safetensors"
PAD, UNKNOWN, END, IMAGE, ANSWER = SPECIAL = ("<pad>", "<unk>", "</s>", "<image>", "<answer>")


def model_config() -> dict[str, Any]:
    """Keyword arguments of ``transformers.LlavaConfig``."""
    return json.loads((ASSETS / "model.json").read_text())


def build_tokenizer() -> Tokenizer:
    """Lower-case words and punctuation marks, one id each; what ``assets/tokenizer.json`` holds."""
    ids = {word: i for i, word in enumerate((*SPECIAL, *vocabulary()))}
    tokenizer = Tokenizer(models.WordLevel(ids, unk_token=UNKNOWN))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.add_special_tokens(list(SPECIAL))
    return tokenizer


def load_tokenizer() -> PreTrainedTokenizerFast:
    """The shipped tokenizer; words that it does not know become ``unk_token``."""
    return PreTrainedTokenizerFast(
        tokenizer_file=str(ASSETS / "tokenizer.json"),
        pad_token=PAD,
        unk_token=UNKNOWN,
        eos_token=END,
    )


def prompt() -> str:
    """What the model reads before it answers; ``{}`` is the question."""
    return IMAGE * model_config()["image_seq_length"] + "{}" + ANSWER


def build_model() -> LlavaForConditionalGeneration:
    """The model with fresh random weights (from torch's global generator), fp32, in eval mode."""
    return LlavaForConditionalGeneration(LlavaConfig(**model_config())).eval()
