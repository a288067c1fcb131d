"""Two processes under each library; one pair of processes runs all of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import accelerate_pair
import lightning_pair
import pytest
import torch
import trainer_pair
from states import assert_same, contents
from tiny_module import TinyModule
from two_processes import run_on_two

from condu import ConDU

TASKS = ("cars", "food")


def train(folder: Path) -> dict[str, Any]:
    return {
        "accelerate": accelerate_pair.train(folder),
        "trainer": trainer_pair.train(folder),
        "replicas": lightning_pair.train_replicas(folder),
        "shards": lightning_pair.train_shards(folder),
        "resumed": lightning_pair.resume_shards(folder),
    }


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("pair")


@pytest.fixture(scope="module")
def ranks(folder: Path) -> list[dict[str, Any]]:
    return run_on_two(train, folder)


def test_accelerate_needs_no_callback(ranks: list[dict[str, Any]]) -> None:
    first, second = (rank["accelerate"] for rank in ranks)
    assert first["wrapper"] == "DistributedDataParallel"
    assert_same(second, first)
    assert_same(first["prepared"], first["bare"])
    assert_same(first["saved"], first["bare"])

    model = accelerate_pair.small_model()
    fusion = ConDU(model)
    for task in TASKS:
        model.load_state_dict(first["finetuned"][task])
        assert fusion.moved()
        fusion.absorb(task)
    assert_same(first["bare"], contents(fusion.state))


def test_the_trainer_of_transformers(ranks: list[dict[str, Any]]) -> None:
    first, second = (rank["trainer"] for rank in ranks)
    assert first["wrapper"] == "DistributedDataParallel"
    assert_same(second, first)
    assert_same(first["callback"], first["by hand"])


def test_replicas_under_lightning(ranks: list[dict[str, Any]]) -> None:
    first, second = (rank["replicas"] for rank in ranks)
    for rank in first, second:
        assert_same(rank["callback"], rank["by hand"])
    # BatchNorm's statistics, and they alone, are each process's own under DistributedDataParallel
    for task in TASKS:
        first["callback"][f"private {task}"] = second["callback"][f"private {task}"]
    assert_same(second["callback"], first["callback"])


def test_shards_under_lightning_are_absorbed_as_a_whole_model_is(
    ranks: list[dict[str, Any]], folder: Path
) -> None:
    first, second = (rank["shards"] for rank in ranks)
    assert "is a DTensor, its pretrained weights a Tensor" in first["refusal"]
    module = TinyModule()
    fusion = ConDU(module)
    for task in TASKS:
        module.load_state_dict(first["finetuned"][task])
        assert fusion.moved()
        fusion.absorb(task)
    saved = contents(ConDU.from_pretrained(folder / "shards", module).state)
    expected = contents(fusion.state)
    assert saved.pop("rescalers") == pytest.approx(expected.pop("rescalers"), rel=2**-21)
    assert_same(saved, expected)
    for task in TASKS:
        with fusion.expert(task):
            torch.testing.assert_close(first["experts"][task], dict(module.state_dict()))
        # the second process keeps its own BatchNorm statistics
        for name in expected["unified"]:
            assert torch.equal(second["experts"][task][name], first["experts"][task][name])


def test_shards_that_are_resumed_start_from_the_pretrained_weights(
    ranks: list[dict[str, Any]],
) -> None:
    for rank in ranks:
        assert_same(rank["resumed"][True], rank["resumed"][False])
