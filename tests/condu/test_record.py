"""What a run records beside its accuracies, and how it is read again."""

from __future__ import annotations

import copy
import dataclasses
import json
import re
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_run import tiny_config, tiny_trainer

from condu.bench import memory
from condu.config import make_config
from condu.evaluation import Evaluator, Row
from condu.methods import METHODS, Method
from condu.reconstruction import Fused, Reconstruction
from condu.record import (
    Basis,
    Learned,
    PeakBytes,
    PhasePeaks,
    Progress,
    Session,
    TaskData,
    Unevaluated,
)
from condu.runfolder import RunFolder, RunFolderError
from condu.training import finetune
from condu.tuning import Trained
from condu.weights import save_weights

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


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("machine", None),
        ("tasks", "hues"),
        ("methods.condu.seconds.fuse", None),
        ("methods.condu.sessions.0.peak_bytes.evaluate.device", "much"),
        ("methods.pam.sessions.1.fused", None),
        ("methods.zero_shot.protocols.agnostic.matrix.1.0", "a half"),
        ("methods.zero_shot.protocols.task-id.bwt", None),
    ],
)
def test_results_that_lack_a_key_or_hold_something_else_are_damaged(
    results: dict[str, Any], tmp_path: Path, key: str, value: Any
) -> None:
    """`value` in the place of a key's, or no such key if it is None."""
    damaged: Any = copy.deepcopy(results)
    *parents, last = (int(part) if part.isdecimal() else part for part in key.split("."))
    inner = damaged
    for parent in parents:
        inner = inner[parent]
    if value is None:
        del inner[last]
    else:
        inner[last] = value
    folder = RunFolder(tmp_path)
    folder.save_results(damaged)
    with pytest.raises(RunFolderError, match=rf"results\.json is damaged: {re.escape(key)}: "):
        folder.load_results()


def test_a_configuration_that_is_none_is_named(results: dict[str, Any], tmp_path: Path) -> None:
    RunFolder(tmp_path).save_results(results | {"configuration": {"seed": "x"}})
    with pytest.raises(RunFolderError, match=r"results\.json is damaged: config: seed: "):
        RunFolder(tmp_path).load_results()


def test_results_may_hold_more_than_is_known(results: dict[str, Any], tmp_path: Path) -> None:
    more = results | {"weather": "fine", "machine": {**results["machine"], "fans": 3}}
    RunFolder(tmp_path).save_results(more)
    assert RunFolder(tmp_path).load_results() == more


@pytest.mark.parametrize("damage", [b"", b'{"format": 2, "met', b"[]", b"null", b"\xff\xfe{}"])
@pytest.mark.parametrize("name", ["results.json", "progress.json"])
def test_files_that_are_no_json_objects_are_named(tmp_path: Path, name: str, damage: bytes) -> None:
    (tmp_path / name).write_bytes(damage)
    folder = RunFolder(tmp_path)
    with pytest.raises(RunFolderError, match=rf"{re.escape(str(tmp_path / name))} is damaged: "):
        folder.load_results() if name == "results.json" else folder.load_progress(BASIS)


def test_the_machine_is_named(results: dict[str, Any]) -> None:
    machine = results["machine"]
    on_gpu = torch.cuda.is_available()
    assert machine["device"] == (torch.cuda.get_device_name() if on_gpu else "cpu")
    assert machine["processes"] == 1
    assert machine["threads"] == torch.get_num_threads()


# progress.json

BASIS = Basis(["a", "b"], {"a": TaskData(["x", "y"], 3, 4)}, "0123456789abcdef")


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"tasks": ["b", "a"]}, "tasks were a, b and are b, a now"),
        ({"data": {"a": TaskData(["x", "z"], 3, 4)}}, "class 1 of task 'a' was 'y' and is 'z' now"),
        ({"data": {"a": TaskData(["x"], 3, 4)}}, "class 1 of task 'a' was 'y' and is None now"),
        ({"data": {"a": TaskData(["x", "y"], 2, 4)}}, "'a' had 3 train images and has 2 now"),
        ({"data": {"a": TaskData(["x", "y"], 3, 9)}}, "'a' had 4 test images and has 9 now"),
        ({"data": {"b": TaskData(["x"], 1, 1)}}, "task 'b' had no classes"),
        ({"pretrained": "0123456789abcdee"}, "the pretrained weights are others now"),
    ],
)
def test_progress_over_something_else_is_refused(
    tmp_path: Path, change: dict[str, Any], expected: str
) -> None:
    RunFolder(tmp_path).save_progress(Progress(BASIS))
    with pytest.raises(RunFolderError, match=f"over something else: .*{expected}"):
        RunFolder(tmp_path).load_progress(dataclasses.replace(BASIS, **change))


def test_progress_comes_back_as_it_was(tmp_path: Path) -> None:
    third = 100 / 3
    session = Session(
        {"task-id": Row([third, 1e-17]), "agnostic": Row([0.0, 100.0], [[1, 2], [3, 4]])},
        *(0.1, 0.2, 0.3),
        PhasePeaks(PeakBytes(2**40, None), None, PeakBytes(3, 4)),
        misaligned=third,
        fused=Fused(7, {"a": Reconstruction(1.5, 0.25, None, -0.5)}),
    )
    progress = Progress(
        BASIS,
        {"condu": [session], "pam": []},
        {"pam": Unevaluated(0, Learned(0.5, misaligned=third), PeakBytes(1, 2))},
    )
    RunFolder(tmp_path).save_progress(progress)
    assert RunFolder(tmp_path).load_progress(BASIS) == progress


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
    values = {"format": 2, "basis": asdict(BASIS), "methods": {"condu": [{"rows": {}}]}}
    (tmp_path / "progress.json").write_text(json.dumps(values))
    with pytest.raises(RunFolderError, match=r"damaged: methods\.condu\.0\.train: "):
        RunFolder(tmp_path).load_progress(BASIS)


@pytest.mark.parametrize("method", ["condu", "wise_ft", "rail_primal", "pam"])
def test_what_learning_took_survives_an_interrupted_evaluation(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    """The seconds and bytes that a resumed run reports are those of the learning, which is done."""
    options = {"methods": [method], "training": {"steps": 2}}
    rows = METHODS[method].rows

    def interrupted(self: Any, index: int, protocols: Any) -> Any:
        if index == 1:
            raise KeyboardInterrupt
        return rows(self, index, protocols)

    with monkeypatch.context() as patch:
        patch.setattr(METHODS[method], "rows", interrupted)
        with pytest.raises(KeyboardInterrupt):
            tiny_trainer(tmp_path, **options).run()
    stored = json.loads((tmp_path / "progress.json").read_text())
    learned = stored["unevaluated"][method]["learned"]
    assert learned["train"] + learned["fuse"] > 0
    results = tiny_trainer(tmp_path, **options).run(resume=True)
    session = results["methods"][method]["sessions"][1]
    assert (session["train"], session["fuse"]) == (learned["train"], learned["fuse"])
    assert session["evaluate"] > learned["evaluate"]
    assert (session["peak_bytes"]["fuse"] is None) == (learned["fuse"] == 0)
    assert session["peak_bytes"]["train"] is not None
    assert json.loads((tmp_path / "progress.json").read_text())["unevaluated"] == {}


# Memory


def test_each_session_has_the_peak_of_the_process(results: dict[str, Any]) -> None:
    on_gpu = torch.cuda.is_available()
    for method in results["methods"].values():
        for session in method["sessions"]:
            for phase, peak in session["peak_bytes"].items():
                assert (peak is not None) == (session[phase] > 0 or phase == "evaluate")
                if peak is not None:
                    assert peak["host"] > 1 << 26
                    assert (peak["device"] is not None) == on_gpu


def test_a_peak_is_that_of_its_own_session(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Greedy(Method):
        name = "greedy"

        def learn(self, index: int) -> Learned:
            return Learned(train=torch.ones(1 << 26 if index == 0 else 1).mean().item())

        def rows(self, index: int, protocols: Any) -> Any:
            return {protocol: Row([50.0, 50.0]) for protocol in protocols}

    monkeypatch.setitem(METHODS, "greedy", Greedy)
    found = tiny_trainer(tmp_path / "run", methods=["greedy"]).run()["methods"]["greedy"]
    first, second = (session["peak_bytes"]["train"]["host"] for session in found["sessions"])
    assert second < first - (128 << 20)  # of 256 MiB


@pytest.mark.parametrize("first", ["individual", "condu"])
def test_a_shared_fine_tuning_counts_for_every_method(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, first: str
) -> None:
    def greedy(*arguments: Any, **options: Any) -> float:
        block = torch.ones(1 << 27)  # 512 MiB
        loss = finetune(*arguments, **options)
        return loss + 0 * block[0].item()

    monkeypatch.setattr("condu.tuning.finetune", greedy)
    others = {"zero_shot", "individual", "condu", "task_arithmetic", "sequential", "wise_ft"}
    methods = [first, *sorted(others - {first})]
    found = tiny_trainer(tmp_path / "run", methods=methods, **QUICK).run()["methods"]
    peaks = {name: found[name]["sessions"][0]["peak_bytes"] for name in methods}
    frozen = peaks["zero_shot"]["evaluate"]["host"] + (400 << 20)
    for name in methods:
        for phase, peak in peaks[name].items():
            assert peak is None or (peak["host"] > frozen) == (phase == "train"), (name, peaks)
    assert {name for name in methods if peaks[name]["train"] is None} == {"zero_shot"}


def test_the_peak_of_a_fine_tuning_is_kept_beside_it(tmp_path: Path) -> None:
    kept = Trained(tmp_path / "new", "hues", 1.5, 0.1, PeakBytes(2**40, None))
    kept.save({"w": torch.ones(1)})
    assert Trained.open(kept.path) == kept
    save_weights(tmp_path / "old", {"w": torch.ones(1)}, task="hues", seconds="1.5", loss="0.1")
    assert Trained.open(tmp_path / "old").peak == PeakBytes(None, None)


# What a session is charged with


def test_reconstruction_is_in_no_seconds_and_no_peak(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def slow(*_: Any) -> Reconstruction:
        time.sleep(1.0)
        block = torch.ones(1 << 26)  # 256 MiB
        return Reconstruction(block[0].item(), 0.5, 0.1, 0.9)

    monkeypatch.setattr("condu.methods.condu.reconstruct", slow)
    found = tiny_trainer(tmp_path / "run", methods=["condu", "zero_shot"], **QUICK).run()["methods"]
    seconds, session = found["condu"]["seconds"], found["condu"]["sessions"][-1]
    assert session["fused"]["tasks"]["tones"]["rescaler"] == 1
    assert seconds["fuse"] + seconds["evaluate"] < 1  # of 3, for one task and then two
    reference = found["zero_shot"]["sessions"][-1]["peak_bytes"]["evaluate"]["host"]
    for phase in ("fuse", "evaluate"):
        assert session["peak_bytes"][phase]["host"] < reference + (128 << 20)


def test_prototypes_belong_to_evaluation_whichever_method_makes_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    add = Evaluator.add_prototypes

    def slow(*arguments: Any) -> None:
        time.sleep(0.5)
        add(*arguments)

    monkeypatch.setattr(Evaluator, "add_prototypes", slow)
    for name, changes in (
        ("condu", QUICK),
        ("dpeclip_id", {"dpeclip_id": {"answers": "zero_shot"}}),
    ):
        found = tiny_trainer(tmp_path / name, methods=[name], **changes).run()["methods"][name]
        assert all(session["evaluate"] > 0.5 for session in found["sessions"])
        if name == "dpeclip_id":
            assert found["seconds"]["train"] == found["seconds"]["fuse"] == 0


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
