"""Every method under every protocol, in whole runs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_run import tiny_trainer
from torch import Tensor

from condu import training, voting
from condu.config import ConfigError, RunConfig
from condu.labels import UNIONS
from condu.methods import ALL
from condu.models.clip import ClipModel
from condu.prototypes import PrototypeSet

EVERY = ("task-id", "agnostic", *UNIONS)
ONE_MODEL = {
    *("zero_shot", "sequential", "wise_ft", "lwf", "zscl", "task_arithmetic"),
    *("sequential_lora", "lora_average", "pam"),
}
Matrix = list[list[float]]


def protocols_of(results: dict[str, Any], method: str) -> dict[str, Matrix]:
    """Matrices by protocol."""
    found = results["methods"][method]
    tables = found.get("protocols", found)
    return {name: tables[name]["matrix"] for name in EVERY if name in tables}


def short(out: Path, *methods: str, **changes: Any) -> dict[str, Any]:
    return tiny_trainer(
        out,
        methods=methods,
        protocols=EVERY,
        training={"steps": 8},
        lora={"targets": ["c_fc"]},
        **changes,
    ).run()


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return short(tmp_path_factory.mktemp("runs") / "run", *ALL)


@pytest.mark.parametrize("method", ALL)
def test_methods_answer_under_the_protocols_that_they_can(
    results: dict[str, Any], method: str
) -> None:
    offered = set(protocols_of(results, method))
    if method.startswith("individual"):
        assert offered == {"task-id"}
    else:
        assert offered == set(EVERY) - ({"union-x-tail"} if method == "dpeclip_id" else set())


@pytest.mark.parametrize("method", [m for m in ALL if not m.startswith("individual")])
def test_a_data_set_that_was_not_learnt_has_its_own_labels_in_odcl_cil(
    results: dict[str, Any], method: str
) -> None:
    rows = protocols_of(results, method)
    assert rows["union-odcl-cil"][0][1] == rows["agnostic"][0][1]


@pytest.mark.parametrize("method", sorted({*ONE_MODEL, "condu", "condu_lora", "emr"}))
def test_the_unions_are_one_when_everything_is_learnt(results: dict[str, Any], method: str) -> None:
    rows = protocols_of(results, method)
    assert rows["union-odcl-cil"][1] == rows["union-x-tail"][1]
    assert rows["union-odcl-cil"] != rows["union-x-tail"]


@pytest.mark.parametrize("method", sorted(ONE_MODEL))
def test_more_labels_are_no_easier_for_one_model(results: dict[str, Any], method: str) -> None:
    rows = protocols_of(results, method)
    assert rows["task-id"] == rows["agnostic"]
    for session in (0, 1):
        for few, some, all_ in zip(*(rows[name][session] for name in EVERY[1:]), strict=True):
            assert few >= some >= all_
    assert rows["union-x-tail"] != rows["agnostic"]


def test_zero_shot_answers_change_with_the_labels_alone(results: dict[str, Any]) -> None:
    rows = protocols_of(results, "zero_shot")
    for protocol in ("task-id", "agnostic", "union-x-tail"):
        assert rows[protocol][0] == rows[protocol][1]
    assert rows["union-odcl-cil"][0] != rows["union-odcl-cil"][1]


# Tasks named by prototypes


@pytest.fixture
def _last_task_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every image is nearest to a prototype of the task that was learnt last."""

    def similarities(features: Tensor, prototypes: PrototypeSet) -> Tensor:
        return torch.arange(1.0, 1 + len(prototypes)).expand(len(features), -1)

    monkeypatch.setattr(voting, "task_similarities", similarities)


@pytest.mark.usefixtures("_last_task_is_named")
def test_the_named_tasks_expert_answers_with_one_of_its_own_classes(tmp_path: Path) -> None:
    found = short(tmp_path / "run", "condu", "dpeclip_id", voting={"k": 1})
    condu, named = (protocols_of(found, name) for name in ("condu", "dpeclip_id"))
    assert named["task-id"] == condu["task-id"]
    assert named["agnostic"] == condu["agnostic"]
    assert named["union-odcl-cil"][1] == [0, condu["task-id"][1][1]]


@pytest.mark.usefixtures("_last_task_is_named")
def test_with_the_pretrained_model_for_answers_nothing_is_trained(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(training, "shuffled_batches", None)
    found = short(tmp_path / "run", "zero_shot", "dpeclip_id", dpeclip_id={"answers": "zero_shot"})
    zero_shot, named = (protocols_of(found, name) for name in ("zero_shot", "dpeclip_id"))
    assert named["task-id"] == named["agnostic"] == zero_shot["agnostic"]
    assert named["union-odcl-cil"][1] == [0, zero_shot["agnostic"][1][1]]
    assert zero_shot["union-odcl-cil"][1][0] > 0
    assert not (tmp_path / "run" / "dpeclip_id").exists()


# What cannot be


def test_the_default_protocols_are_without_unions() -> None:
    assert RunConfig().protocols == ("task-id", "agnostic")


def test_a_union_takes_a_method_that_needs_no_task(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"'individual' needs .* only: union-x-tail"):
        tiny_trainer(tmp_path / "run", methods=["individual"], protocols=["union-x-tail"])
    with pytest.raises(ConfigError, match=r"'dpeclip_id' needs .* only: union-x-tail"):
        tiny_trainer(tmp_path / "run", methods=["dpeclip_id"], protocols=["union-x-tail"])


@pytest.mark.parametrize("protocols", [["union-odcl-cil"], ["task-id", "union-odcl-cil"]])
@pytest.mark.parametrize("method", ["zero_shot", "sequential", "condu", "pam"])
def test_a_union_takes_a_model_that_knows_of_classes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: str, protocols: list[str]
) -> None:
    monkeypatch.setattr(training, "shuffled_batches", None)
    monkeypatch.setattr(ClipModel, "votes", False)
    trainer = tiny_trainer(tmp_path / "run", methods=[method], protocols=protocols)
    with pytest.raises(ConfigError, match=r"protocols: 'union-odcl-cil' .* model.name is 'tiny'"):
        trainer.run()
