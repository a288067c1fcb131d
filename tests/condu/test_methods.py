from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tiny_run import tiny_trainer

from condu import tuning
from condu.methods import METHODS, Method, register

Run = Callable[..., dict[str, Any]]


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The methods' part of one whole run."""
    return tiny_trainer(tmp_path_factory.mktemp("runs") / "run").run()["methods"]


def matrix(results: dict[str, Any], method: str, protocol: str = "task-id") -> list[list[float]]:
    return results[method][protocol]["matrix"]


def trained_by(
    methods: list[str], out: Path, monkeypatch: pytest.MonkeyPatch
) -> list[tuple[str, bool]]:
    """What a run with these methods fine-tunes: (task, from θ_0)."""
    seen: list[tuple[str, bool]] = []
    trainer = tiny_trainer(out, methods=methods, training={"steps": 1})
    start = trainer.live.model.state_dict()["visual.proj"].clone()
    finetune = tuning.finetune

    def counted(clip: Any, task: Any, *args: Any, **kwargs: Any) -> float:
        seen.append((task.name, bool((clip.model.visual.proj == start).all())))
        return finetune(clip, task, *args, **kwargs)

    monkeypatch.setattr(tuning, "finetune", counted)
    trainer.run()
    return seen


def test_nothing_is_trained_twice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    every = ["condu", "sequential", "individual", "zero_shot"]
    assert trained_by(every, tmp_path / "run", monkeypatch) == [
        ("hues", True),  # for all three: the first task of a sequence starts from θ_0 as well
        ("tones", True),
        ("tones", False),
    ]


@pytest.mark.parametrize(
    ("method", "expected"),
    [
        ("zero_shot", []),
        ("individual", [("hues", True), ("tones", True)]),
        ("sequential", [("hues", True), ("tones", False)]),
        ("condu", [("hues", True), ("tones", True)]),
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


def test_protocols_can_be_chosen(tmp_path: Path) -> None:
    trainer = tiny_trainer(tmp_path / "run", methods=["zero_shot", "condu"], protocols=["agnostic"])
    methods = trainer.run()["methods"]
    assert [set(method) for method in methods.values()] == [{"agnostic", "seconds"}] * 2


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
    from condu.methods import Learned

    class Guess(Method):
        name = "guess"

        def learn(self, index: int) -> Learned:
            return Learned(train=1.5)

        def rows(self, index: int, protocols: Any) -> Any:
            return {protocol: [float(index), 50.0] for protocol in protocols}

    monkeypatch.setitem(METHODS, "guess", Guess)
    found = tiny_trainer(tmp_path / "run", methods=["guess"]).run()["methods"]["guess"]
    assert found["agnostic"]["matrix"] == [[0, 50], [1, 50]]
    assert found["seconds"]["train"] == 3
