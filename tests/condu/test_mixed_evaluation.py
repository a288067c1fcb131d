"""Evaluation in mixed precision: towers in bfloat16, everything made of their features in fp32."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.state import AcceleratorState
from tiny_run import tiny_benchmark, tiny_clip, tiny_trainer
from torch import Tensor, nn

from condu.models import load_vqa
from condu.tasks import Benchmark, VqaTask, load_benchmark


def bfloat16() -> torch.autocast:
    return torch.autocast("cpu", torch.bfloat16)


def dtypes_of(module: Any, seen: set[torch.dtype]) -> None:
    """Note in `seen` what a module puts out from now on."""
    module.register_forward_hook(lambda _module, _input, output: seen.add(output.dtype))


def test_towers_run_in_the_given_context_and_nothing_else_does() -> None:
    clip, benchmark = tiny_clip(), tiny_benchmark()
    task = benchmark["hues"]
    seen: set[torch.dtype] = set()
    dtypes_of(clip.model.visual.conv1, seen)
    dtypes_of(clip.model.transformer.resblocks[0].mlp.c_fc, seen)
    plain = clip.evaluator(benchmark, batch_size=32).frozen_answers(task)
    assert seen == {torch.float32}
    seen.clear()
    mixed = clip.evaluator(benchmark, batch_size=32, autocast=bfloat16).frozen_answers(task)
    assert seen == {torch.bfloat16}
    assert mixed.features.dtype == mixed.logits.dtype == torch.float32
    assert not torch.equal(mixed.features, plain.features)
    torch.testing.assert_close(mixed.features, plain.features, atol=0.02, rtol=0)
    torch.testing.assert_close(mixed.features.norm(dim=1), torch.ones(90))
    # had the products of features been rounded to bfloat16, logits would repeat
    assert len(mixed.logits.unique()) > 0.9 * mixed.logits.numel()


@pytest.fixture
def _own_accelerator() -> Iterator[None]:
    """A process has one precision, which other tests have set or will set."""
    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.mark.usefixtures("_own_accelerator")
@pytest.mark.parametrize(
    ("precision", "expected"), [("no", torch.float32), ("bf16", torch.bfloat16)]
)
def test_a_run_evaluates_in_its_own_precision(
    tmp_path: Path, precision: str, expected: torch.dtype
) -> None:
    trainer = tiny_trainer(tmp_path / "run", methods=["zero_shot"], mixed_precision=precision)
    seen: set[torch.dtype] = set()
    model: Any = trainer.live.model
    assert isinstance(model, nn.Module)
    dtypes_of(model.visual.conv1, seen)
    trainer.run()
    assert seen == {expected}
    weights: list[Tensor] = list(model.state_dict().values())
    assert {weight.dtype for weight in weights} == {torch.float32}


def test_answers_are_generated_in_the_given_context() -> None:
    sample: Any = next(iter(load_benchmark("mini_vqa"))).load("test")
    task = VqaTask("one", lambda split: [sample[0]])
    vqa, seen = load_vqa("mini_vqa"), set()
    dtypes_of(next(m for m in vqa.model.modules() if isinstance(m, nn.Linear)), seen)
    vqa.evaluator(Benchmark("b", (task,)), batch_size=1, autocast=bfloat16).accuracies()
    assert seen == {torch.bfloat16}
