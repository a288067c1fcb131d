"""Configurations for MTIL that come with the package: what they say, and that they run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import mtil_folders
import pytest
import typer
from PIL import Image
from small_clip import small_clip

from condu import cli, trainer
from condu.config import RunConfig, find_config, load_config, make_config
from condu.tasks.mtil import ORDERS
from condu.trainer import ContinualTrainer

READY = sorted(f.stem for f in (Path(cli.__file__).parent / "configs").glob("mtil_*.yaml"))
FEW_SHOT = {"mtil_condu_ft_5shot": 5, "mtil_condu_lora_5shot": 5, "mtil_xtail_rail_16shot": 16}


def load(name: str) -> RunConfig:
    return load_config(find_config(Path("configs", f"{name}.yaml")))


@pytest.mark.parametrize("name", READY)
def test_training_is_that_of_the_papers(name: str) -> None:
    ready = load(name)
    assert (ready.model.name, ready.model.pretrained) == ("ViT-B-16-quickgelu", "openai")
    assert ready.benchmark.shots == FEW_SHOT.get(name)
    training = ready.training
    assert training.steps == (500 if name in FEW_SHOT else 1000)
    assert training.warmup * training.steps == 100
    assert (training.batch_size, training.label_smoothing, training.weight_decay) == (64, 0.2, 0)
    if "lora" in name:
        assert set(ready.lora.task_lr) == set(ORDERS["I"])
        assert ready.lora.task_lr == load("mtil_condu_lora").lora.task_lr
    elif name != "mtil_rail":  # which trains nothing
        rates = {task: training.learning_rate_of(task) for task in ORDERS["I"]}
        assert {task for task, rate in rates.items() if rate == 5e-5} == {"Aircraft", "MNIST"}
        assert set(rates.values()) == {1e-5, 5e-5}


@pytest.mark.parametrize("name", READY)
def test_data_sets_are_those_of_order_one(name: str) -> None:
    ready = load(name)
    assert ready.benchmark.order is not None
    used = list(ready.benchmark.order[: ready.benchmark.tasks])
    if name == "mtil_xtail_rail_16shot":
        assert used == [task for task in ORDERS["I"] if task != "CIFAR100"]
        assert ready.protocols == ("union-x-tail",)
    else:
        assert used == list(ORDERS["I"])
        assert ready.protocols == ("task-id", "agnostic")


@pytest.mark.parametrize("name", [name for name in READY if "condu" in name or "xtail" in name])
def test_voting_and_rescaler_are_those_of_the_authors_code(name: str) -> None:
    ready = load(name)
    assert (ready.fusion.rescale, ready.voting.preset) == ("tensor_mean", "code")


def test_settings_of_the_other_methods_are_their_papers() -> None:
    zscl = load("mtil_zscl").zscl
    assert (zscl.batch_size, zscl.temperature, zscl.l2, zscl.average_every) == (64, 2, 1, 100)
    for name in ("mtil_rail", "mtil_xtail_rail_16shot"):
        rail = load(name).rail
        assert (rail.hidden, rail.ridge, rail.gamma) == (15000, 0.1, 0.1)
        assert (rail.kernel_ridge, rail.weight) == (1e-3, 0.8)
    baselines = load("mtil_baselines")
    assert (baselines.wise_ft.weight, baselines.lwf.temperature) == (0.8, 2)


def shrunk(ready: RunConfig, folder: Path) -> RunConfig:
    """The same for two data sets in ``folder`` and two steps, without processes for the images."""
    values = ready.model_dump()
    changes: dict[str, Any] = {
        "benchmark": {"root": str(folder / "data"), "download": False, "workers": 0, "tasks": 2},
        "training": {"steps": 2, "batch_size": 8},
        "lora": {"rank": 2},
        "rail": {"hidden": 16},
        "evaluation": {"cache": str(folder / "features")},
    }
    for section, change in changes.items():
        values[section] |= change
    if values["zscl"]["images"] is not None:
        Image.new("RGB", (20, 20)).save(folder / "reference.png")
        (folder / "captions.tsv").write_text("a photo\tfrom here\na picture\tfrom there\n")
        values["zscl"] |= {"images": folder, "captions": folder / "captions.tsv", "batch_size": 1}
    return make_config(values)


@pytest.mark.filterwarnings("ignore:.*published numbers")
@pytest.mark.parametrize("name", READY)
def test_they_run(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mtil_folders.write(tmp_path / "data", "Aircraft", "Caltech101", monkeypatch=monkeypatch)
    monkeypatch.setattr(trainer, "load_model", small_clip)
    ready = load(name)
    results = ContinualTrainer.from_config(shrunk(ready, tmp_path), tmp_path / "run").run()
    assert results["tasks"] == ["Aircraft", "Caltech101"]
    assert list(results["methods"]) == list(ready.methods)


def test_the_command_names_them_all() -> None:
    commands: Any = typer.main.get_command(cli.app)
    config, *_ = commands.commands["run"].params
    for name in READY:
        assert name.removesuffix("_5shot") in config.help
