from __future__ import annotations

import dataclasses
import json
import math
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from tiny_run import (
    Images,
    numbers,
    run_in_two_processes,
    tiny_benchmark,
    tiny_clip,
    tiny_config,
    tiny_trainer,
)

from condu import training
from condu.config import ConfigError, load_config, make_config
from condu.metrics import summarize
from condu.models.clip import ClipModel
from condu.progress import RunProgress
from condu.runfolder import RunFolder, RunFolderError
from condu.tasks.configured import make_benchmark
from condu.training import finetune, learning_rate, train_all_weights
from condu.weights import copy_weights, load_weights, weights_in
from condu_ext.files import replace

SCRIPT = Path(__file__).with_name("tiny_run.py")
QUICK: dict[str, Any] = {"training": {"steps": 2}}


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of one whole run."""
    out = tmp_path_factory.mktemp("runs") / "run"
    tiny_trainer(out).run()
    return out


def results(out: Path) -> dict[str, Any]:
    return json.loads((out / "results.json").read_text())


# Learning rate


def test_warm_up_is_linear_and_ends_at_the_peak() -> None:
    rates = [learning_rate(step, steps=20, warmup=4, peak=8.0) for step in range(5)]
    assert rates == [2, 4, 6, 8, 8]


def test_the_cosine_halves_in_the_middle_and_ends_near_zero() -> None:
    rate = {s: learning_rate(s, steps=104, warmup=4, peak=1.0) for s in range(104)}
    assert rate[54] == pytest.approx(0.5)
    assert rate[29] == pytest.approx((1 + math.sqrt(0.5)) / 2)
    assert 0 < rate[103] < 1e-3
    assert all(rate[s] > rate[s + 1] for s in range(4, 103))


def test_without_warm_up_the_first_step_is_at_the_peak() -> None:
    assert learning_rate(0, steps=1, warmup=0, peak=0.5) == 0.5


# Fine-tuning


def tuned(task: int = 0, seed: int = 0, **changes: Any) -> dict[str, torch.Tensor]:
    clip = tiny_clip()
    config = tiny_config(**changes).training
    task_ = tiny_benchmark().tasks[task]
    train_all_weights(clip)
    finetune(clip, task_, config, Accelerator(), seed=seed, progress=RunProgress())
    return copy_weights(clip.model)


def test_a_fine_tuning_repeats_whatever_random_numbers_were_drawn_before() -> None:
    first = tuned(**QUICK)
    torch.rand(17)
    second, other = tuned(**QUICK), tuned(seed=1, **QUICK)
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert any(not torch.equal(first[name], other[name]) for name in first)


def test_both_towers_learn_and_the_logit_scale_does_not() -> None:
    before, after = copy_weights(tiny_clip().model), tuned(**QUICK)
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert any(name.startswith("visual.") for name in moved)
    assert any(name.startswith("transformer.") for name in moved)
    assert "logit_scale" not in moved


def test_one_step_moves_by_the_learning_rate_which_a_task_may_have_of_its_own() -> None:
    before = copy_weights(tiny_clip().model)["visual.proj"]
    after = tuned(training={"steps": 1, "lr": 1e-3, "warmup": 0})["visual.proj"]
    assert (after - before).abs().max().item() == pytest.approx(1e-3, rel=1e-2)  # as Adam's first
    own = tuned(training={"steps": 1, "task_lr": {"hues": 1e-2}, "warmup": 0})["visual.proj"]
    assert (own - before).abs().max().item() == pytest.approx(1e-2, rel=1e-2)


def test_training_text_comes_from_the_first_template() -> None:
    clip = tiny_clip()
    prompts: list[str] = []

    def tokenize(texts: Sequence[str]) -> torch.Tensor:
        prompts.extend(texts)
        return clip.tokenize(texts)

    recorded = dataclasses.replace(clip, tokenize=tokenize)
    task, config = tiny_benchmark().tasks[0], tiny_config(**QUICK).training
    finetune(recorded, task, config, Accelerator(), seed=0, progress=RunProgress())
    assert set(prompts) == {"a photo of red", "a photo of green", "a photo of blue"}


def test_a_loss_that_is_not_finite_stops_the_run_and_leaves_no_model(tmp_path: Path) -> None:
    trainer = tiny_trainer(tmp_path / "run", training={"steps": 4, "lr": 1e30})
    with pytest.raises(FloatingPointError, match=r"task 'hues': the loss is nan at step \d of 4"):
        trainer.run()
    assert not list(tmp_path.rglob("*.safetensors"))


# Weights and files


def test_borrowed_weights_are_given_back_after_an_error() -> None:
    model = tiny_clip().model
    before = copy_weights(model)

    def fail() -> None:
        with weights_in(model, {"logit_scale": torch.tensor(3.0)}):
            assert model.state_dict()["logit_scale"] == 3
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    after = copy_weights(model)
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_a_file_is_replaced_whole_or_not_at_all(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_text("old")

    def half(path: Path) -> None:
        path.write_text("ne")
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        replace(file, half)
    assert file.read_text() == "old"


# Runs


def test_results_have_every_method_protocol_and_number(finished: Path) -> None:
    found = results(finished)
    assert (found["benchmark"], found["seed"], found["tasks"]) == ("tiny", 42, ["hues", "tones"])
    both = {"task-id", "agnostic"}
    protocols = {name: set(method["protocols"]) for name, method in found["methods"].items()}
    assert protocols == {
        "zero_shot": both,
        "individual": {"task-id"},
        "sequential": both,
        "condu": both,
        "condu_lora": both,
        "pam": both,
    }
    for name, method in found["methods"].items():
        assert set(method["seconds"]) == {"train", "fuse", "evaluate"}
        assert (method["seconds"]["train"] > 0) == (name != "zero_shot")
        assert (method["seconds"]["fuse"] > 0) == (name in ("condu", "condu_lora", "pam"))
        for protocol in protocols[name]:
            table = method["protocols"][protocol]
            summary = summarize(table["matrix"])
            assert [len(row) for row in table["matrix"]] == [2, 2]
            for metric in ("transfer", "average", "last", "acc", "bwt", "forgetting"):
                assert table[metric] == getattr(summary, metric)
    assert set(found["versions"]) >= {"condu", "condu_ext", "torch", "open_clip", "python"}
    assert found["machine"]["cpus"] >= 1


def test_a_run_leaves_its_configuration_models_state_and_prototypes(finished: Path) -> None:
    assert load_config(finished / "config.yaml") == tiny_config()
    assert (finished / "finetuned" / "001.safetensors").exists()
    assert (finished / "condu" / "state" / "config.json").exists()
    assert (finished / "prototypes.safetensors").exists()


def test_a_run_repeats(finished: Path, tmp_path: Path) -> None:
    again = tiny_trainer(tmp_path / "again").run()
    assert numbers(again) == numbers(results(finished))


def test_another_seed_is_another_run(finished: Path, tmp_path: Path) -> None:
    other = tiny_trainer(tmp_path / "other", seed=1).run()
    assert numbers(other) != numbers(results(finished))


def test_two_processes_share_the_batch_and_train_the_same_models(
    finished: Path, tmp_path: Path
) -> None:
    run_in_two_processes(tmp_path / "run")
    assert set(results(tmp_path / "run")["methods"]) == set(results(finished)["methods"])
    folders = ("finetuned", "lora-4")
    for file in (
        f"{folder}/{number}.safetensors" for folder in folders for number in ("000", "001")
    ):
        alone, together = load_weights(finished / file), load_weights(tmp_path / "run" / file)
        for name, expected in alone.items():
            if not name.endswith("in_proj_bias"):  # keys' bias: no gradient, so Adam follows noise
                torch.testing.assert_close(together[name], expected, atol=1e-3, rtol=0)


def test_one_task_has_no_transfer(tmp_path: Path) -> None:
    trainer = tiny_trainer(tmp_path / "run", methods=["condu"], **QUICK)
    trainer.benchmark = trainer.benchmark.subset(1)
    table = trainer.run()["methods"]["condu"]["protocols"]["agnostic"]
    assert table["transfer"] is None
    assert table["last"] == table["matrix"][0][0]


def test_the_model_is_the_pretrained_one_again_after_a_run(tmp_path: Path) -> None:
    trainer = tiny_trainer(tmp_path / "run", **QUICK)
    before = copy_weights(trainer.live.model)
    trainer.run()
    after = copy_weights(trainer.live.model)
    assert all(torch.equal(before[name], after[name]) for name in before)


@pytest.mark.parametrize("methods", [["sequential", "condu"], ["condu_lora", "pam"]])
def test_a_killed_run_ends_with_the_numbers_and_weights_of_an_undisturbed_one(
    tmp_path: Path, methods: list[str]
) -> None:
    done = subprocess.run(
        [sys.executable, str(SCRIPT), "kill", str(tmp_path), *methods],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    undisturbed, *killed = json.loads(done.stdout)
    assert len(killed) > 12  # configuration, models, state, prototypes, rows and results
    assert [n for n, outcome in enumerate(killed) if outcome != undisturbed] == []


def test_resuming_a_finished_run_trains_nothing(
    finished: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(training, "shuffled_batches", None)
    before = results(finished)
    after = tiny_trainer(finished).run(resume=True)
    assert after == before


def test_resume_starts_what_has_not_begun(tmp_path: Path) -> None:
    tiny_trainer(tmp_path / "new", methods=["zero_shot"]).run(resume=True)
    assert (tmp_path / "new" / "results.json").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"methods": ["individual", "condu"], "protocols": ["agnostic"]}, "'individual' needs"),
        ({"methods": ["individual", "pam"], "lora": {"targets": ["cfc"]}}, "target 'cfc' matches"),
    ],
)
def test_what_the_configuration_has_wrong_shows_before_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any], message: str
) -> None:
    monkeypatch.setattr(training, "shuffled_batches", None)
    with pytest.raises(ValueError, match=message):
        tiny_trainer(tmp_path / "run", **changes).run()


def test_a_model_that_cannot_vote_has_one_protocol_which_is_checked_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(training, "shuffled_batches", None)
    monkeypatch.setattr(ClipModel, "votes", False)
    changes = {"methods": ["pam", "condu_lora"], "protocols": ["agnostic"]}
    with pytest.raises(
        ConfigError, match="'condu_lora' on model 'tiny' needs the protocol task-id"
    ):
        tiny_trainer(tmp_path / "run", **changes).run()


def test_processes_that_do_not_know_of_each_other_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = tiny_trainer(tmp_path / "run")
    monkeypatch.setattr("condu.trainer.Accelerator", lambda **_: Accelerator())
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ConfigError, match=r"2 processes were launched.*ACCELERATE_USE_CPU"):
        trainer.run()
    assert not (tmp_path / "run").exists()


def test_resume_refuses_another_configuration(finished: Path) -> None:
    with pytest.raises(RunFolderError, match=r"training\.lr was 0\.003 and is now 0\.5"):
        tiny_trainer(finished, training={"lr": 0.5}).run(resume=True)


def test_resume_refuses_other_tasks(finished: Path) -> None:
    trainer = tiny_trainer(finished)
    trainer.benchmark = trainer.benchmark.order(["tones", "hues"])
    with pytest.raises(RunFolderError, match="tasks were hues, tones and are tones, hues now"):
        trainer.run(resume=True)


def test_resume_refuses_other_images_and_weights(finished: Path) -> None:
    trainer = tiny_trainer(finished)
    hues, tones = trainer.benchmark.tasks
    fewer = dataclasses.replace(hues, load=lambda split: Images([(9, 9, 9)] * 2, "train"))
    trainer.benchmark = dataclasses.replace(trainer.benchmark, tasks=(fewer, tones))
    with pytest.raises(RunFolderError, match="task 'hues' had 90 test images and has 48 now"):
        trainer.run(resume=True)
    trainer = tiny_trainer(finished)
    next(trainer.live.model.parameters()).data.view(-1)[0] += 1
    with pytest.raises(RunFolderError, match="the pretrained weights are others now"):
        trainer.run(resume=True)


def test_two_processes_do_not_work_on_one_run(finished: Path) -> None:
    script = "import fcntl, sys; file = open(sys.argv[1], 'r+b'); fcntl.flock(file, fcntl.LOCK_EX);"
    script += "print('held', flush=True); input()"
    command = [sys.executable, "-c", script, str(finished / "config.yaml")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == b"held\n"
        with pytest.raises(RunFolderError, match=f"{finished}: another process works on this run"):
            tiny_trainer(finished).run(resume=True)
        other.communicate(b"\n")
    tiny_trainer(finished).run(resume=True)


def test_what_a_method_refuses_leaves_no_folder(tmp_path: Path) -> None:
    trainer = tiny_trainer(tmp_path / "run", methods=["zscl"])
    trainer.benchmark = dataclasses.replace(trainer.benchmark, reference=None)
    with pytest.raises(ConfigError, match=r"zscl\.images"):
        trainer.run()
    assert not (tmp_path / "run").exists()


def test_a_folder_in_use_is_refused_and_an_empty_one_is_not(tmp_path: Path) -> None:
    RunFolder.create(tmp_path, tiny_config())
    with pytest.raises(RunFolderError, match="--resume"):
        tiny_trainer(tmp_path).run()


def test_unfinished_and_foreign_folders_have_no_results(tmp_path: Path) -> None:
    with pytest.raises(RunFolderError, match="not the folder of a run"):
        RunFolder(tmp_path).load_results()
    RunFolder.create(tmp_path / "run", tiny_config())
    with pytest.raises(RunFolderError, match="has not finished"):
        RunFolder(tmp_path / "run").load_results()


# Benchmarks from configurations


def test_order_and_number_of_tasks() -> None:
    names = [task.name for task in make_benchmark(make_config({}))]
    order = names[::-1]
    config = make_config({"benchmark": {"order": order, "tasks": 2}})
    assert [task.name for task in make_benchmark(config)] == order[:2]
    some = make_config({"benchmark": {"order": [order[3], order[0]]}})
    assert [task.name for task in make_benchmark(some)] == [order[3], order[0]]


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({"benchmark": {"tasks": 99}}, r"benchmark\.tasks: got 99, but there are \d tasks"),
        ({"benchmark": {"order": ["cars"]}}, r"benchmark\.order: .* has no task 'cars'"),
        ({"lora": {"task_lr": {"cars": 1}}}, r"lora\.task_lr: .* has no task 'cars'"),
        ({"training": {"task_lr": {"cars": 1}}}, r"training\.task_lr: .* has no task 'cars'"),
    ],
)
def test_tasks_that_there_are_not_are_named(values: dict[str, Any], expected: str) -> None:
    with pytest.raises(ConfigError, match=expected):
        make_benchmark(make_config(values))
