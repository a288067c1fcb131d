"""How near decoupled deltas come, against a rebuild in float64 from what the state says."""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from tiny_run import tiny_clip, tiny_trainer
from torch import Tensor

import condu_ext as cx
from condu.models.lora import add_lora
from condu.reconstruction import Reconstruction, reconstruct
from condu.weights import copy_weights, load_weights
from condu_ext import FusionRule, UnifiedDelta

SHAPES = {"conv": (4, 3, 5, 7), "weight": (9, 11), "bias": (13,), "scale": (), "none": (0, 3)}
NAMES = ("one", "two", "three")


@pytest.fixture
def pretrained() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {name: torch.randn(shape, generator=generator) for name, shape in SHAPES.items()}


def finetuned(pretrained: dict[str, Tensor], seed: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        name: value + 0.1 * torch.randn(value.shape, generator=generator)
        for name, value in pretrained.items()
    }


def written(weights: dict[str, Tensor], path: Path) -> Path:
    save_file({name: value.contiguous() for name, value in weights.items()}, path)
    return path


def expected(d: dict[str, Tensor], rebuilt: dict[str, Tensor]) -> tuple[float, float]:
    """Relative L2 and cosine, from all elements in one float64 vector each."""
    a, b = (
        np.concatenate([np.asarray(m[name], dtype=np.float64).ravel() for name in d])
        for m in (rebuilt, d)
    )
    size = np.linalg.norm(b)
    return np.linalg.norm(a - b) / size, float(a @ b / np.linalg.norm(a) / size)


GPU = pytest.param(
    "cuda",
    marks=[pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")],
)


@pytest.mark.parametrize("device", ["cpu", GPU])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rescale", ["global", "per_tensor"])
def test_numbers_are_those_of_an_explicit_rebuild(
    pretrained: dict[str, Tensor], tmp_path: Path, rescale: Any, dtype: torch.dtype, device: str
) -> None:
    state = UnifiedDelta.empty(pretrained, rule=FusionRule(rescale=rescale), dtype=dtype)
    models = {task: finetuned(pretrained, seed) for seed, task in enumerate(NAMES)}
    for task, model in models.items():
        state = cx.absorb(state, task, model, pretrained)
    for task, model in models.items():
        file = written(model, tmp_path / task)
        found = reconstruct(state.to(device), task, pretrained, file)
        rescaler, mask = state.rescaler(task), state.mask(task)
        table = rescaler if isinstance(rescaler, dict) else dict.fromkeys(SHAPES, rescaler)
        rebuilt = {name: table[name] * mask[name] * state.delta[name].double() for name in SHAPES}
        d = {name: model[name].double() - pretrained[name].double() for name in SHAPES}
        relative, cosine = expected(d, rebuilt)
        assert found.relative_l2 == pytest.approx(relative, rel=1e-6)
        assert found.cosine == pytest.approx(cosine, rel=1e-6)
        assert 0.1 < relative < 2  # else the tolerance would say nothing
        bits = np.concatenate([mask[name].numpy().ravel() for name in SHAPES])
        assert found.density == pytest.approx(bits.mean())
        assert found.rescaler == statistics.median(table.values())


def test_a_single_task_comes_back_exactly(pretrained: dict[str, Tensor], tmp_path: Path) -> None:
    model = finetuned(pretrained, 1)
    state = cx.unify({"one": model}, pretrained)
    found = reconstruct(state, "one", pretrained, written(model, tmp_path / "one"))
    assert (found.rescaler, found.density, found.relative_l2) == (1, 1, 0)
    assert found.cosine == pytest.approx(1, abs=1e-15)


def test_a_task_that_did_not_move_has_no_error(
    pretrained: dict[str, Tensor], tmp_path: Path
) -> None:
    state = cx.unify({"still": pretrained, "two": finetuned(pretrained, 2)}, pretrained)
    found = reconstruct(state, "still", pretrained, written(pretrained, tmp_path / "still"))
    assert found == Reconstruction(rescaler=0, density=0, relative_l2=None, cosine=None)


def test_an_outvoted_task_is_wholly_lost(pretrained: dict[str, Tensor], tmp_path: Path) -> None:
    strong = {name: value + 2 for name, value in pretrained.items()}
    weak = {name: value - 1 for name, value in pretrained.items()}
    with pytest.warns(UserWarning, match="weak"):
        state = cx.unify({"strong": strong, "weak": weak}, pretrained)
    found = reconstruct(state, "weak", pretrained, written(weak, tmp_path / "weak"))
    assert found == Reconstruction(rescaler=0, density=0, relative_l2=1, cosine=None)


def test_tied_tensors_count_once_and_private_ones_not_at_all(tmp_path: Path) -> None:
    def model(*values: float) -> dict[str, Tensor]:
        tied = torch.tensor(values)
        return {"a": tied, "b": tied, "other": tied[:1].clone(), "head": 100 * tied}

    base, first, second = model(0.0, 0.0), model(1.0, -1.0), model(3.0, 1.0)
    state = UnifiedDelta.empty(base, private=("head",))
    for task, weights in (("first", first), ("second", second)):
        state = cx.absorb(state, task, weights, base)
    saved = {name: value.clone() for name, value in first.items()}
    found = reconstruct(state, "first", base, written(saved, tmp_path / "first"))
    # elements: 1, −1 of the tied tensor and 1; elected +, tie to −, +; u is 3, −1, 3
    scale = 3 / 7
    assert found.rescaler == pytest.approx(scale)
    assert found.density == 1
    rebuilt = torch.tensor([3 * scale, -1 * scale, 3 * scale])
    error = (rebuilt - torch.tensor([1.0, -1.0, 1.0])).norm() / 3**0.5
    assert found.relative_l2 == pytest.approx(error.item(), rel=1e-6)


def test_what_a_file_lacks_or_has_in_another_shape_is_named(
    pretrained: dict[str, Tensor], tmp_path: Path
) -> None:
    state = cx.unify({"one": finetuned(pretrained, 1)}, pretrained)
    without = {name: value for name, value in pretrained.items() if name != "bias"}
    with pytest.raises(KeyError, match="task 'one': has no tensor 'bias'"):
        reconstruct(state, "one", pretrained, written(without, tmp_path / "without"))
    other = {**pretrained, "bias": torch.zeros(5)}
    with pytest.raises(ValueError, match=r"'bias': has the shape \(5,\), .* state is \(13,\)"):
        reconstruct(state, "one", pretrained, written(other, tmp_path / "other"))
    with pytest.raises(KeyError, match="unknown task 'two'"):
        reconstruct(state, "two", pretrained, tmp_path / "other")


def test_a_run_holds_each_unified_model_against_its_own_fine_tuned_ones(tmp_path: Path) -> None:
    """Of the adapters the factors, which PEFT's names in the file must be matched with."""
    trainer = tiny_trainer(
        tmp_path / "run", methods=["condu", "condu_lora", "emr"], training={"steps": 4}
    )
    lora = trainer.config.lora
    adapted = add_lora(tiny_clip().model, rank=4, targets=lora.targets or (), seed=42)
    starts = {"condu": copy_weights(tiny_clip().model), "condu_lora": copy_weights(adapted)}
    methods = trainer.run()["methods"]
    for method, folder in (("condu", "finetuned"), ("condu_lora", "lora-4")):
        state = UnifiedDelta.load(tmp_path / "run" / method / "state")
        last = methods[method]["sessions"][-1]["fused"]
        assert last["bytes"] == state.nbytes
        assert list(last["tasks"]) == ["hues", "tones"]
        assert [len(s["fused"]["tasks"]) for s in methods[method]["sessions"]] == [1, 2]
        for number, (task, found) in enumerate(last["tasks"].items()):
            weights = load_weights(tmp_path / "run" / folder / f"{number:03d}.safetensors")
            moved = {
                name.replace(".default.", "."): value - starts[method][name]
                for name, value in weights.items()
            }
            d = {name: moved[name] for name in state.delta}
            relative, cosine = expected(d, dict(cx.decouple(state, task, None)))
            assert found["relative_l2"] == pytest.approx(relative, rel=1e-6)
            assert found["cosine"] == pytest.approx(cosine, rel=1e-6)
            assert found["rescaler"] == state.rescaler(task)
    continual, at_once = (methods[name]["sessions"] for name in ("condu", "emr"))
    assert continual[0]["fused"]["tasks"] == at_once[0]["fused"]["tasks"]
    assert at_once[1]["fused"]["tasks"].keys() == {"hues", "tones"}
