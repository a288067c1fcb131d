"""What a run records beside its accuracies, and how it is read again."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_run import tiny_benchmark, tiny_clip, tiny_config, tiny_trainer

from condu.bench import memory
from condu.config import make_config
from condu.evaluation import Row
from condu.feature_sample import save_feature_sample
from condu.features import encode_images
from condu.methods import METHODS, Learned, Method
from condu.prototypes import PrototypeSet
from condu.reconstruction import Fused, Reconstruction
from condu.record import PeakBytes, Progress, Session
from condu.runfolder import RunFolder, RunFolderError
from condu.weights import load_weights

QUICK: dict[str, Any] = {"training": {"steps": 2}}
IMAGES = 90  # in each test set of the tiny benchmark


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("runs") / "run"
    tiny_trainer(out, methods=["zero_shot", "condu", "pam"], **QUICK).run()
    return out


@pytest.fixture(scope="module")
def results(finished: Path) -> dict[str, Any]:
    return RunFolder(finished).load_results()


# results.json


def test_votes_are_of_methods_that_vote_and_count_every_image(results: dict[str, Any]) -> None:
    for name, method in results["methods"].items():
        for table in method["protocols"].values():
            assert ("votes" in table) == (name == "condu")
    protocols = results["methods"]["condu"]["protocols"]
    known, unknown = protocols["task-id"]["votes"], protocols["agnostic"]["votes"]
    for session, (own, voted) in enumerate(zip(known, unknown, strict=True)):
        tasks = session + 1  # so far
        assert [len(row) for row in own + voted] == [tasks] * 4
        for data_set in range(tasks):
            expected = [IMAGES * (task == data_set) for task in range(tasks)]
            assert own[data_set] == expected
        assert all(sum(row) == IMAGES for row in voted)


def test_seconds_are_the_sums_of_the_sessions(results: dict[str, Any]) -> None:
    for method in results["methods"].values():
        assert len(method["sessions"]) == 2
        for kind, seconds in method["seconds"].items():
            assert seconds == pytest.approx(sum(s[kind] for s in method["sessions"]))


def test_only_a_unified_model_is_recorded_as_fused(results: dict[str, Any]) -> None:
    fused = {
        name: [session["fused"] is not None for session in method["sessions"]]
        for name, method in results["methods"].items()
    }
    assert fused == {"zero_shot": [False] * 2, "condu": [True] * 2, "pam": [False] * 2}


def test_classes_and_the_complete_configuration_are_there(results: dict[str, Any]) -> None:
    assert results["format"] == 2
    assert results["classes"] == {
        "hues": ["red", "green", "blue"],
        "tones": ["dark", "grey", "light"],
    }
    config = make_config(results["configuration"])
    assert config == tiny_config(methods=["zero_shot", "condu", "pam"], **QUICK)


@pytest.mark.parametrize("found", [None, 1, 3])
def test_results_of_another_format_are_refused(tmp_path: Path, found: int | None) -> None:
    folder = RunFolder(tmp_path)
    folder.save_results({} if found is None else {"format": found})
    message = rf"results\.json has format {found or 1}, .* knows format 2"
    with pytest.raises(RunFolderError, match=message):
        folder.load_results()


# progress.json


def test_progress_comes_back_as_it_was(tmp_path: Path) -> None:
    third = 100 / 3
    session = Session(
        {"task-id": Row([third, 1e-17]), "agnostic": Row([0.0, 100.0], [[1, 2], [3, 4]])},
        *(0.1, 0.2, 0.3),
        PeakBytes(2**40, None),
        misaligned=third,
        fused=Fused(7, {"a": Reconstruction(1.5, 0.25, None, -0.5)}),
    )
    progress = Progress(["a", "b"], {"condu": [session], "pam": []})
    RunFolder(tmp_path).save_progress(progress)
    assert RunFolder(tmp_path).load_progress(["a", "b"]) == progress


def test_progress_of_an_older_version_is_refused_and_left_alone(tmp_path: Path) -> None:
    out = tmp_path / "run"
    RunFolder.create(out, tiny_config(methods=["zero_shot"]))
    file = out / "progress.json"
    rows = {"task-id": [[1.0, 2.0]], "agnostic": [[1.0, 2.0]]}
    old = {"tasks": ["hues", "tones"], "methods": {"zero_shot": {"rows": rows, "train": 0.0}}}
    file.write_text(json.dumps(old))
    with pytest.raises(RunFolderError, match=r"progress\.json has format 1, .* began the run"):
        tiny_trainer(out, methods=["zero_shot"]).run(resume=True)
    assert json.loads(file.read_text()) == old


def test_damaged_progress_is_named(tmp_path: Path) -> None:
    values = {"format": 2, "tasks": ["a"], "methods": {"condu": [{"rows": {}}]}}
    (tmp_path / "progress.json").write_text(json.dumps(values))
    with pytest.raises(RunFolderError, match=r"damaged: methods\.condu\.0\.train: "):
        RunFolder(tmp_path).load_progress(["a"])


# Memory


def test_each_session_has_the_peak_of_the_process(results: dict[str, Any]) -> None:
    peaks = [s["peak_bytes"] for m in results["methods"].values() for s in m["sessions"]]
    assert all(peak["host"] > 1 << 26 for peak in peaks)
    on_gpu = torch.cuda.is_available()
    assert all((peak["device"] is not None) == on_gpu for peak in peaks)


def test_a_peak_is_that_of_its_own_session(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Greedy(Method):
        name = "greedy"

        def learn(self, index: int) -> Learned:
            return Learned(train=torch.ones(1 << 26 if index == 0 else 1).mean().item())

        def rows(self, index: int, protocols: Any) -> Any:
            return {protocol: Row([50.0, 50.0]) for protocol in protocols}

    monkeypatch.setitem(METHODS, "greedy", Greedy)
    found = tiny_trainer(tmp_path / "run", methods=["greedy"]).run()["methods"]["greedy"]
    first, second = (session["peak_bytes"]["host"] for session in found["sessions"])
    assert second < first - (128 << 20)  # of 256 MiB


def test_a_peak_begins_anew() -> None:
    cpu = torch.device("cpu")
    memory.restart_peaks(cpu)
    before, _ = memory.peaks(cpu)
    block = torch.ones(1 << 24)
    del block
    high, device = memory.peaks(cpu)
    assert before is not None
    assert high is not None
    assert high - before > 48 << 20  # of 64 MiB, for some may have been there
    assert device is None
    memory.restart_peaks(cpu)
    low, _ = memory.peaks(cpu)
    assert low is not None
    assert low < high - (32 << 20)


def test_without_the_kernels_help_the_peak_is_that_of_the_process(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cpu = torch.device("cpu")
    before, _ = memory.peaks(cpu)
    monkeypatch.setattr(memory, "_CLEAR", tmp_path / "missing" / "clear_refs")
    memory.restart_peaks(cpu)
    after, _ = memory.peaks(cpu)
    assert before is not None
    assert after is not None
    assert after >= before
    monkeypatch.setattr(memory, "_STATUS", tmp_path / "missing")
    assert memory.peaks(cpu) == (None, None)


# The sample of features


def test_the_sample_holds_frozen_features_of_test_images(finished: Path) -> None:
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
    clip, benchmark = tiny_clip(), tiny_benchmark()
    samples = []
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        torch.rand(3)
        save_feature_sample(tmp_path / name, clip, benchmark, seed=seed)
        samples.append(load_weights(tmp_path / name)["1.features"])
    first, again, other = samples
    assert len(first) == 20
    assert len(first.unique(dim=0)) == 20  # none twice
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_a_model_that_does_not_vote_has_no_sample(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = tiny_trainer(tmp_path / "run", methods=["zero_shot"])
    monkeypatch.setattr(type(trainer.live), "votes", False)
    trainer.run()
    assert not (tmp_path / "run" / "features.safetensors").exists()
