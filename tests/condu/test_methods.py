from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_run import numbers, tiny_trainer
from torch import nn

import condu_ext
from condu import tuning
from condu.methods import METHODS, Method, register
from condu.models.base import LiveModel
from condu.tasks.benchmark import Benchmark
from condu.trainer import ContinualTrainer
from condu.weights import copy_weights, load_weights

Run = Callable[..., dict[str, Any]]


ADAPTERS = ("individual_lora", "condu_lora", "sequential_lora", "lora_average", "pam")


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of one whole run with every method, adapters all of one rank."""
    out = tmp_path_factory.mktemp("runs") / "run"
    targets = ["c_fc", "c_proj", "attn"]
    lora = {"rank": 4, "lr": 0.03, "steps": 32, "targets": targets}
    tiny_trainer(out, methods=list(METHODS), lora=lora, pam={"rank": 4, "period": 2}).run()
    return out


@pytest.fixture(scope="module")
def results(run: Path) -> dict[str, Any]:
    """The methods' part of it."""
    return json.loads((run / "results.json").read_text())["methods"]


def matrix(results: dict[str, Any], method: str, protocol: str = "task-id") -> list[list[float]]:
    return results[method]["protocols"][protocol]["matrix"]


def trained_by(
    methods: list[str], out: Path, monkeypatch: pytest.MonkeyPatch
) -> list[tuple[str, bool]]:
    """What a run with these methods fine-tunes: (task, from θ_0)."""
    seen: list[tuple[str, bool]] = []
    trainer = tiny_trainer(
        out, methods=methods, training={"steps": 1}, lora={"rank": 4}, pam={"rank": 4}
    )
    starts: dict[nn.Module, dict[str, torch.Tensor]] = {}
    finetune = tuning.finetune

    def counted(live: LiveModel, task: Any, *args: Any, **kwargs: Any) -> float:
        weights = copy_weights(live.model)
        start = starts.setdefault(live.model, weights)  # nothing is trained before the first task
        seen.append((task.name, all(torch.equal(start[n], weights[n]) for n in start)))
        return finetune(live, task, *args, **kwargs)

    monkeypatch.setattr(tuning, "finetune", counted)
    trainer.run()
    return seen


def test_nothing_is_trained_twice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    every = ["condu", "emr", "sequential", "wise_ft", "individual", "zero_shot"]
    assert trained_by(every, tmp_path / "run", monkeypatch) == [
        ("hues", True),  # for all five: the first task of a sequence starts from θ_0 as well
        ("tones", True),
        ("tones", False),  # sequential
        ("tones", False),  # wise_ft
    ]


def test_adapters_of_one_rank_are_trained_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert trained_by(list(ADAPTERS), tmp_path / "run", monkeypatch) == [
        ("hues", True),
        ("tones", True),  # individual_lora and condu_lora
        ("tones", False),  # sequential_lora
        ("tones", False),  # lora_average
        ("tones", False),  # pam
    ]


@pytest.mark.parametrize(
    ("method", "expected"),
    [
        ("zero_shot", []),
        ("individual", [("hues", True), ("tones", True)]),
        ("sequential", [("hues", True), ("tones", False)]),
        ("wise_ft", [("hues", True), ("tones", False)]),
        ("lwf", [("hues", True), ("tones", False)]),
        ("zscl", [("hues", True), ("tones", False)]),
        ("rail_primal", []),
        ("condu", [("hues", True), ("tones", True)]),
        ("emr", [("hues", True), ("tones", True)]),
        ("individual_lora", [("hues", True), ("tones", True)]),
        ("condu_lora", [("hues", True), ("tones", True)]),
        ("sequential_lora", [("hues", True), ("tones", False)]),
        ("lora_average", [("hues", True), ("tones", False)]),
        ("pam", [("hues", True), ("tones", False)]),
    ],
)
def test_what_a_method_trains(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: str, expected: list[tuple[str, bool]]
) -> None:
    assert trained_by([method], tmp_path / "run", monkeypatch) == expected


def test_methods_that_share_a_fine_tuning_report_its_time(results: dict[str, Any]) -> None:
    assert results["condu"]["seconds"]["train"] == results["individual"]["seconds"]["train"]


def test_zero_shot_never_changes(results: dict[str, Any]) -> None:
    first, second = matrix(results, "zero_shot")
    assert first == second
    assert matrix(results, "zero_shot", "agnostic") == matrix(results, "zero_shot")


def test_individual_is_zero_shot_until_a_task_is_seen(results: dict[str, Any]) -> None:
    rows, untrained = matrix(results, "individual"), matrix(results, "zero_shot")[0]
    assert rows[0][1] == untrained[1]
    assert rows[1][0] == rows[0][0] > untrained[0]
    assert rows[1][1] > untrained[1]


def test_sequential_starts_as_individual_and_then_changes(results: dict[str, Any]) -> None:
    rows, individual = matrix(results, "sequential"), matrix(results, "individual")
    assert rows[0][0] == individual[0][0]
    assert rows[1] != individual[1]
    assert matrix(results, "sequential", "agnostic") == rows


def test_condu_with_one_task_is_that_tasks_model_everywhere(results: dict[str, Any]) -> None:
    """One delta decouples to itself, and the only expert wins every vote."""
    rows, voted = matrix(results, "condu"), matrix(results, "condu", "agnostic")
    assert rows[0][0] == matrix(results, "individual")[0][0]
    assert rows[0] == voted[0] == matrix(results, "sequential")[0]


def test_adapters_learn(results: dict[str, Any]) -> None:
    rows, untrained = matrix(results, "individual_lora"), matrix(results, "zero_shot")[0]
    assert rows[0][0] > untrained[0] + 20
    assert rows[1][1] > untrained[1] + 20


def test_every_method_with_adapters_begins_with_the_same_one(results: dict[str, Any]) -> None:
    """One delta decouples to itself, and the first adapter is the global one."""
    first = matrix(results, "individual_lora")[0][0]
    assert {matrix(results, method)[0][0] for method in ADAPTERS} == {first}
    assert matrix(results, "condu_lora", "agnostic")[0] == matrix(results, "pam")[0]


def test_averaging_joins_the_halves_of_what_was_and_what_came(run: Path) -> None:
    before = load_weights(run / "lora-4" / "000.safetensors")
    trained = load_weights(run / "lora_average" / "finetuned.safetensors")
    merged = load_weights(run / "lora_average" / "model.safetensors")
    assert merged.keys() == before.keys()
    assert all(torch.equal(merged[n], 0.5 * before[n] + 0.5 * trained[n]) for n in merged)


def test_aligning_leaves_no_strong_weight_misaligned(run: Path) -> None:
    """The period divides the number of steps, so the last step was followed by aligning."""

    def misaligned(method: str, name: str) -> int:
        g = load_weights(run / "lora-4" / "000.safetensors")[name]
        w = load_weights(run / method / "finetuned.safetensors")[name]
        ranked = g.abs().flatten().sort(descending=True).values
        strong = g.abs() >= ranked[math.ceil(g.numel() / 2) - 1]
        return int((strong & (g.sign() * w.sign() < 0)).sum())

    names = load_weights(run / "lora-4" / "000.safetensors")
    assert sum(misaligned("lora_average", name) for name in names) > 0
    assert sum(misaligned("pam", name) for name in names) == 0


def test_merging_reports_the_misaligned_share_of_each_task_from_the_second(
    run: Path, results: dict[str, Any]
) -> None:
    shares = [
        [session["misaligned"] for session in results[name]["sessions"]]
        for name in ("lora_average", "pam")
    ]
    (undefined, average), (_, aligned) = shares
    assert undefined is None
    g = load_weights(run / "lora-4" / "000.safetensors")
    w = load_weights(run / "lora_average" / "finetuned.safetensors")
    opposite = sum(int((g[name] * w[name] < 0).sum()) for name in g)
    assert average == opposite / sum(value.numel() for value in g.values())
    assert 0 < aligned < average


def test_ranks_of_their_own_mean_adapters_of_their_own(tmp_path: Path) -> None:
    methods = ["individual_lora", "pam"]
    tiny_trainer(
        tmp_path / "run",
        methods=methods,
        training={"steps": 1},
        lora={"rank": 2, "steps": 3},
        pam={"rank": 3},
    ).run()
    ranks = {
        rank: load_weights(tmp_path / "run" / f"lora-{rank}" / "000.safetensors") for rank in (2, 3)
    }
    for rank, weights in ranks.items():
        assert {w.shape[0] for name, w in weights.items() if "lora_A" in name} == {rank}
    assert not (tmp_path / "run" / "lora-3" / "001.safetensors").exists()


def test_targets_can_be_chosen_and_wrong_ones_are_named(tmp_path: Path) -> None:
    lora = {"rank": 2, "targets": ["attn"]}
    tiny_trainer(
        tmp_path / "run", methods=["individual_lora"], training={"steps": 1}, lora=lora
    ).run()
    weights = load_weights(tmp_path / "run" / "lora-2" / "000.safetensors")
    assert all(".attn." in name for name in weights)
    with pytest.raises(ValueError, match="target 'q_proj' matches no module"):
        tiny_trainer(
            tmp_path / "other", methods=["pam"], lora={"targets": ["q_proj"]}, training={"steps": 1}
        ).run()


def three_tasks(out: Path, **changes: Any) -> ContinualTrainer:
    """Merging by the mean, over the tasks hues, tones, and hues once more."""
    trainer = tiny_trainer(
        out, methods=["pam"], training={"steps": 2}, pam={"average": "mean"}, **changes
    )
    hues, tones = trainer.benchmark.tasks
    again = dataclasses.replace(hues, name="again")
    trainer.benchmark = Benchmark("tiny", (hues, tones, again))
    return trainer


def test_merging_knows_how_many_tasks_there_were(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    weights: list[float] = []
    average_ = condu_ext.average_

    def watched(g: Any, w: Any, weight: float) -> None:
        weights.append(weight)
        average_(g, w, weight)

    monkeypatch.setattr(condu_ext, "average_", watched)
    three_tasks(tmp_path / "run").run()
    assert weights == [1 - 1 / 2, 1 - 1 / 3]


def test_a_kill_right_after_merging_merges_nothing_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "run"
    expected = numbers(three_tasks(out).run())["pam"]
    weights = load_weights(out / "pam" / "model.safetensors")
    progress = json.loads((out / "progress.json").read_text())
    del progress["methods"]["pam"][2]
    (out / "progress.json").write_text(json.dumps(progress))
    monkeypatch.setattr(tuning, "finetune", None)
    monkeypatch.setattr(condu_ext, "average_", None)
    assert numbers(three_tasks(out).run(resume=True))["pam"] == expected
    again = load_weights(out / "pam" / "model.safetensors")
    assert all(torch.equal(weights[name], again[name]) for name in weights)


def test_statistics_belong_to_the_adapter_that_moved_them(tmp_path: Path) -> None:
    """BatchNorm's running mean is no weight, but fine-tuning changes it."""
    trainer = tiny_trainer(
        tmp_path / "run", methods=["individual_lora"], training={"steps": 2}, lora={"rank": 2}
    )
    model: Any = trainer.live.model
    model.visual.conv1 = nn.Sequential(model.visual.conv1, nn.BatchNorm2d(32))
    model.eval()
    before = copy_weights(model)
    trainer.run()
    saved = load_weights(tmp_path / "run" / "lora-2" / "000.safetensors")
    (mean,) = (value for name, value in saved.items() if name.endswith("running_mean"))
    assert not torch.equal(mean, before["visual.conv1.1.running_mean"])
    after = copy_weights(model)
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_what_adapters_do_to_an_attention_is_undone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """PEFT adds B·A to the frozen weights of an attention and takes it away again, by rounding."""
    finetune = tuning.finetune
    seen: list[dict[str, torch.Tensor]] = []

    def watched(live: LiveModel, *args: Any, **kwargs: Any) -> float:
        seen.append(copy_weights(live.model))
        return finetune(live, *args, **kwargs)

    monkeypatch.setattr(tuning, "finetune", watched)
    lora = {"rank": 2, "targets": ["attn"], "lr": 0.1}
    tiny_trainer(tmp_path / "run", methods=["sequential_lora"], lora=lora, pam={"rank": 2}).run()
    first, second = seen
    frozen = [name for name in first if "lora_" not in name]
    assert any("in_proj_weight" in name for name in frozen)
    assert all(torch.equal(first[name], second[name]) for name in frozen)


def test_protocols_can_be_chosen(tmp_path: Path) -> None:
    trainer = tiny_trainer(tmp_path / "run", methods=["zero_shot", "condu"], protocols=["agnostic"])
    methods = trainer.run()["methods"]
    assert [set(method["protocols"]) for method in methods.values()] == [{"agnostic"}] * 2


def test_the_fusion_rule_and_the_state_dtype_reach_the_state(tmp_path: Path) -> None:
    fusion = {"zero_sum": "positive", "rescale": "per_tensor", "state_dtype": "bfloat16"}
    trainer = tiny_trainer(
        tmp_path / "run", methods=["condu"], training={"steps": 1}, fusion=fusion
    )
    trainer.run()
    state = json.loads((tmp_path / "run" / "condu" / "state" / "config.json").read_text())
    text = json.dumps(state)
    assert all(f'"{value}"' in text for value in ("positive", "per_tensor"))
    assert "bfloat16" in text


def test_a_name_is_registered_once() -> None:
    with pytest.raises(ValueError, match="'zero_shot' is registered twice"):
        register(METHODS["zero_shot"])


def test_a_new_method_needs_only_a_class(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from condu.evaluation import Row
    from condu.methods import Learned

    class Guess(Method):
        name = "guess"

        def learn(self, index: int) -> Learned:
            return Learned(train=1.5)

        def rows(self, index: int, protocols: Any) -> Any:
            return {protocol: Row([float(index), 50.0]) for protocol in protocols}

    monkeypatch.setitem(METHODS, "guess", Guess)
    found = tiny_trainer(tmp_path / "run", methods=["guess"]).run()["methods"]["guess"]
    assert found["protocols"]["agnostic"]["matrix"] == [[0, 50], [1, 50]]
    assert found["seconds"]["train"] == 3
