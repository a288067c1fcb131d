"""Generative vision–language models that answer questions: LLaVA through transformers.

A sample is one sequence, *prompt* (image, question) then *answer* then the end token. Training
looks at answer and end token alone; evaluation lets the model generate and compares texts.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar

import torch
import torch.nn.functional as F
from PIL.Image import Image
from torch import Tensor, nn
from torch.utils.data import Dataset

from condu.evaluation import Row
from condu.features import inference
from condu.tasks.vqa import VqaTask

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

    from condu.labels import Protocol
    from condu.models.base import Autocast, Objective
    from condu.tasks.benchmark import Benchmark

IGNORED = -100
"""Label of a token that is not learnt (``torch.nn.functional.cross_entropy``'s ignore_index)."""

LORA_TARGETS = (
    *("q_proj", "k_proj", "v_proj", "o_proj", "out_proj"),
    *("gate_proj", "up_proj", "down_proj", "fc1", "fc2"),
    *("linear_1", "linear_2"),
)
"""Every linear layer but the output head: vision tower, projector, language model."""

Batch = Mapping[str, Tensor]


@dataclass(frozen=True)
class VqaModel:
    """A model that answers questions about images, and what belongs to it.

    model: a ``LlavaForConditionalGeneration``, or one inside a ``PeftModel``.
    tokenizer: a fast tokenizer with a padding, an end and, if it has one, an unknown token.
    prompt: what stands before the answer, ``{}`` for the question, with one image token for each
        patch that the model sees.
    train_transform, test_transform: an RGB image to float32 [3, H, W]; the first crops at random.

    To the trainer it is a ``condu.models.base.LiveModel``.
    """

    frozen: ClassVar[tuple[str, ...]] = ("*.post_layernorm.*",)
    """The vision tower's last norm: LLaVA reads the tower before it, so it gets no gradient."""
    votes: ClassVar[bool] = False
    lora_targets: ClassVar[tuple[str, ...]] = LORA_TARGETS
    task_type: ClassVar[type] = VqaTask

    name: str
    model: nn.Module
    tokenizer: PreTrainedTokenizerFast
    prompt: str
    train_transform: Callable[[Image], Tensor]
    test_transform: Callable[[Image], Tensor]

    def with_model(self, model: nn.Module) -> VqaModel:
        """The same over another live module, such as a ``PeftModel`` over this one's."""
        return replace(self, model=model)

    def encode(self, text: str) -> list[int]:
        """Token ids, special tokens in ``text`` included, none added. ValueError naming the first
        unknown word."""
        encoded = self.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        for token, (start, end) in zip(
            encoded["input_ids"], encoded["offset_mapping"], strict=True
        ):
            if token == self.tokenizer.unk_token_id:
                raise ValueError(
                    f"model {self.name!r} does not know the word {text[start:end]!r} of {text!r}"
                )
        return encoded["input_ids"]

    def sample(self, pixels: Tensor, question: str, answer: str) -> dict[str, Tensor]:
        """pixel_values float32 [3, H, W], input_ids and labels int64 [L]: the prompt, the answer
        and the end token, with the labels of the prompt ignored."""
        prompt = self.encode(self.prompt.format(question))
        target = [*self.encode(answer), self.tokenizer.eos_token_id]
        return {
            "pixel_values": pixels,
            "input_ids": torch.tensor([*prompt, *target]),
            "labels": torch.tensor([*[IGNORED] * len(prompt), *target]),
        }

    def training_set(self, task: VqaTask) -> TrainingSet:
        """The task's training questions, encoded when they are read: unknown words raise then."""
        return TrainingSet(self, task)

    def collate(self, samples: Sequence[Batch]) -> dict[str, Tensor]:
        """A batch of ``training_set``'s samples, padded on the right to the longest.

        pixel_values float32 [B, 3, H, W]; input_ids, attention_mask and labels int64 [B, L].
        """
        ids = nn.utils.rnn.pad_sequence
        pad = self.tokenizer.pad_token_id
        tokens = [sample["input_ids"] for sample in samples]
        return {
            "pixel_values": torch.stack([sample["pixel_values"] for sample in samples]),
            "input_ids": ids(tokens, batch_first=True, padding_value=pad),
            "attention_mask": ids([torch.ones_like(row) for row in tokens], batch_first=True),
            "labels": ids(
                [sample["labels"] for sample in samples], batch_first=True, padding_value=IGNORED
            ),
        }

    def objective(self, task: VqaTask, label_smoothing: float) -> Objective:
        """``answer_loss`` with this label smoothing; the same for every task."""
        return partial(answer_loss, label_smoothing=label_smoothing)

    def evaluator(
        self, benchmark: Benchmark, *, batch_size: int, autocast: Autocast = nullcontext
    ) -> VqaEvaluator:
        return VqaEvaluator(self, benchmark, batch_size=batch_size, autocast=autocast)


def answer_loss(model: nn.Module, batch: Batch, *, label_smoothing: float = 0.0) -> Tensor:
    """Mean cross-entropy over the answer tokens, end tokens included, of a batch of
    ``VqaModel.collate`` under a model, wrapped (PEFT, DDP) or not."""
    inputs = {name: tensor for name, tensor in batch.items() if name != "labels"}
    # the logits of a position are about the next one
    logits, labels = model(**inputs).logits[:, :-1], batch["labels"][:, 1:]
    return F.cross_entropy(
        logits.flatten(0, 1).float(),
        labels.flatten(),
        ignore_index=IGNORED,
        label_smoothing=label_smoothing,
    )


class TrainingSet(Dataset[dict[str, Tensor]]):
    """The training questions of a task as samples (``VqaModel.sample``)."""

    def __init__(self, vqa: VqaModel, task: VqaTask) -> None:
        self.vqa = vqa
        self.source: Any = task.load("train")

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        image, question, answer = self.source[index]
        return self.vqa.sample(self.vqa.train_transform(image), question, answer)


@dataclass(frozen=True)
class _TestSet:
    """samples of (image, question, answer); prompts and mask int64 [N, L], padded on the left; the
    answers and the most tokens that one of them needs."""

    samples: Any
    prompts: Tensor
    mask: Tensor
    answers: list[str]
    longest: int


class VqaEvaluator:
    """Accuracy of the weights that ``vqa.model`` holds at the moment on the tests of ``benchmark``.

    Prompts and answers stay in host memory, images are read for each batch anew. Batches go to the
    device of the model's parameters.
    """

    def __init__(
        self,
        vqa: VqaModel,
        benchmark: Benchmark,
        *,
        batch_size: int,
        autocast: Autocast = nullcontext,
    ) -> None:
        self.vqa = vqa
        self.benchmark = benchmark
        self._batch_size = batch_size
        self._autocast = autocast
        self._tests: dict[str, _TestSet] = {}

    def over(self, vqa: VqaModel) -> VqaEvaluator:
        """The same over another live model with the same tokenizer, sharing the test inputs."""
        other = copy.copy(self)
        other.vqa = vqa
        return other

    def accuracy(self, task: VqaTask) -> float:
        """Percent of the test questions to which the greedily generated text is the answer, but
        for case and blanks around it. ValueError for an empty test set and for unknown words."""
        answers = self._test_set(task).answers
        right = [
            _normal(text) == _normal(answer)
            for text, answer in zip(self.generate(task), answers, strict=True)
        ]
        return 100.0 * sum(right) / len(right)

    def accuracies(self) -> list[float]:
        """``accuracy`` on every task of the benchmark, in its order."""
        return [self.accuracy(task) for task in self.benchmark]

    def rows(self, seen: int, protocols: Sequence[Protocol]) -> dict[Protocol, Row]:
        """``accuracies``, the same for every protocol."""
        row = Row(self.accuracies())
        return {protocol: row for protocol in protocols}

    def generate(self, task: VqaTask) -> list[str]:
        """What the model says to each test question, greedily."""
        test, model, tokenizer = self._test_set(task), self.vqa.model, self.vqa.tokenizer
        device = next(model.parameters()).device
        texts: list[str] = []
        generate: Any = model.generate
        with inference(model), self._autocast():
            for start in range(0, len(test.answers), self._batch_size):
                part = slice(start, start + self._batch_size)
                pixels = [
                    self.vqa.test_transform(test.samples[i][0])
                    for i in range(len(test.answers))[part]
                ]
                tokens = generate(
                    pixel_values=torch.stack(pixels).to(device),
                    input_ids=test.prompts[part].to(device),
                    attention_mask=test.mask[part].to(device),
                    max_new_tokens=test.longest,
                    do_sample=False,
                    pad_token_id=tokenizer.pad_token_id,
                    eos_token_id=tokenizer.eos_token_id,
                )
                said = tokens[:, test.prompts.shape[1] :]
                texts += tokenizer.batch_decode(said, skip_special_tokens=True)
        return texts

    def _test_set(self, task: VqaTask) -> _TestSet:
        if task.name not in self._tests:
            samples: Any = task.load("test")
            if not len(samples):
                raise ValueError(f"task {task.name!r}: the test set is empty")
            texts = [samples[i][1:] for i in range(len(samples))]
            vqa = self.vqa
            prompts = [torch.tensor(vqa.encode(vqa.prompt.format(q))) for q, _ in texts]
            pad = vqa.tokenizer.pad_token_id
            self._tests[task.name] = _TestSet(
                samples=samples,
                prompts=_left_padded(prompts, pad),
                mask=_left_padded([torch.ones_like(row) for row in prompts], 0),
                answers=[answer for _, answer in texts],
                longest=max(len(vqa.encode(answer)) for _, answer in texts) + 1,
            )
        return self._tests[task.name]


def load_vqa(name: str) -> VqaModel:
    """The model called ``name``, in eval mode, fp32, on the CPU: ``"mini_vqa"``, which ships with
    condu.tasks.mini_vqa. ValueError for any other name."""
    if name != "mini_vqa":
        raise ValueError(f"unknown model {name!r}, the ones that answer questions are: 'mini_vqa'")
    from condu.tasks.mini.model import load_weights
    from condu.tasks.mini_vqa.model import WEIGHTS, build_vqa

    vqa = build_vqa()
    load_weights(vqa.model, WEIGHTS)
    return vqa


def _left_padded(rows: Sequence[Tensor], value: int) -> Tensor:
    return nn.utils.rnn.pad_sequence(
        list(rows), batch_first=True, padding_value=value, padding_side="left"
    )


def _normal(text: str) -> str:
    return text.strip().lower()
