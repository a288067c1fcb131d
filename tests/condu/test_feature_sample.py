"""The frozen features that a run keeps for a picture, and what becomes of a run without them."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_run import tiny_benchmark, tiny_clip, tiny_trainer

from condu.feature_sample import save_feature_sample
from condu.features import encode_images
from condu.prototypes import PrototypeSet
from condu.runfolder import RunFolder
from condu.weights import load_weights

IMAGES = 90  # in each test set of the tiny benchmark


def test_the_sample_holds_frozen_features_of_test_images(tmp_path: Path) -> None:
    finished = tmp_path / "run"
    tiny_trainer(finished, methods=["condu"], training={"steps": 2}).run()
    found = load_weights(finished / "features.safetensors")
    assert found.keys() == {f"{i}.{part}" for i in (0, 1) for part in ("features", "labels")}
    clip = tiny_clip()
    for position, task in enumerate(tiny_benchmark()):
        features, labels = encode_images(clip.model, task.dataset("test", clip.test_transform))
        assert len(features) == IMAGES  # fewer than a sample may have: all of them, in order
        torch.testing.assert_close(found[f"{position}.features"], features)
        assert torch.equal(found[f"{position}.labels"], labels)
    prototypes = PrototypeSet.load(finished / "prototypes.safetensors")
    assert prototypes["hues"].shape[1] == found["0.features"].shape[1]


def test_a_sample_is_drawn_by_the_seed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("condu.feature_sample.IMAGES", 20)
    evaluator = tiny_clip().evaluator(tiny_benchmark(), batch_size=16)
    samples = []
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        torch.rand(3)
        save_feature_sample(tmp_path / name, evaluator, seed=seed)
        samples.append(load_weights(tmp_path / name)["1.features"])
    first, again, other = samples
    assert len(first) == 20
    assert len(first.unique(dim=0)) == 20  # none twice
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def spied_batches(monkeypatch: pytest.MonkeyPatch, model: Any) -> list[int]:
    """How many images the model encodes at a time, from now on."""
    sizes: list[int] = []
    encode = model.encode_image

    def noted(images: torch.Tensor, *arguments: Any, **options: Any) -> torch.Tensor:
        sizes.append(len(images))
        return encode(images, *arguments, **options)

    monkeypatch.setattr(model, "encode_image", noted)
    return sizes


def test_a_sample_is_of_what_was_answered_already(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("condu.feature_sample.IMAGES", 20)
    clip, benchmark = tiny_clip(), tiny_benchmark()
    evaluator = clip.evaluator(benchmark, batch_size=16)
    save_feature_sample(tmp_path / "anew", evaluator, seed=1)
    evaluator.frozen_rows(0, ["agnostic"])
    sizes = spied_batches(monkeypatch, clip.model)
    save_feature_sample(tmp_path / "kept", evaluator, seed=1)
    assert sizes == []
    anew, kept = load_weights(tmp_path / "anew"), load_weights(tmp_path / "kept")
    assert anew.keys() == kept.keys()
    for name, expected in anew.items():
        torch.testing.assert_close(kept[name], expected)


def test_a_sample_of_what_was_not_answered_is_encoded_as_an_evaluation_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("condu.feature_sample.IMAGES", 20)
    clip, benchmark = tiny_clip(), tiny_benchmark()
    sizes = spied_batches(monkeypatch, clip.model)
    bfloat16 = partial(torch.autocast, "cpu", torch.bfloat16)
    evaluator = clip.evaluator(benchmark, batch_size=8, autocast=bfloat16)
    save_feature_sample(tmp_path / "mixed", evaluator, seed=1)
    assert sizes == [8, 8, 4] * 2  # no other images
    save_feature_sample(tmp_path / "plain", clip.evaluator(benchmark, batch_size=8), seed=1)
    mixed, plain = (load_weights(tmp_path / name)["0.features"] for name in ("mixed", "plain"))
    assert mixed.dtype == torch.float32
    assert not torch.equal(mixed, plain)
    torch.testing.assert_close(mixed, plain, atol=0.02, rtol=0)


def test_a_sample_that_fails_leaves_results_and_may_be_had_later(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "run"
    with monkeypatch.context() as patch:

        def fail(*_: Any, **__: Any) -> None:
            raise OSError("no image")

        patch.setattr("condu.trainer.save_feature_sample", fail)
        with pytest.raises(OSError, match="no image"):
            tiny_trainer(out, methods=["zero_shot"]).run()
    # of a machine that the run is not resumed on
    before = RunFolder(out).load_results()
    before["machine"]["cpus"] = 1000
    RunFolder(out).save_results(before)
    assert not (out / "features.safetensors").exists()
    assert tiny_trainer(out, methods=["zero_shot"]).run(resume=True) == before
    assert (out / "features.safetensors").exists()


def test_a_model_that_does_not_vote_has_no_sample(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = tiny_trainer(tmp_path / "run", methods=["zero_shot"])
    monkeypatch.setattr(type(trainer.live), "votes", False)
    trainer.run()
    assert not (tmp_path / "run" / "features.safetensors").exists()
