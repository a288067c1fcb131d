from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from condu.config import (
    ConfigError,
    LoraConfig,
    RunConfig,
    TrainingConfig,
    demo_config,
    difference,
    find_config,
    load_config,
    make_config,
)
from condu.voting import SemanticVoting


def write(folder: Path, text: str) -> Path:
    path = folder / "run.yaml"
    path.write_text(text)
    return path


def test_defaults_are_the_papers() -> None:
    config = RunConfig()
    training = config.training
    assert (training.steps, training.batch_size, training.lr) == (1000, 64, 1e-5)
    assert (training.warmup * training.steps, training.label_smoothing) == (100, 0.2)
    assert (training.weight_decay, training.betas) == (0, (0.9, 0.999))
    assert config.seed == 42
    assert config.voting.voting() == SemanticVoting.preset("paper")
    assert (config.fusion.rule().zero_sum, config.fusion.rule().rescale) == ("negative", "global")


def test_a_file_is_read_and_written_back_unchanged(tmp_path: Path) -> None:
    config = load_config(
        write(
            tmp_path,
            """
            benchmark: {name: mini, tasks: 3}
            methods: [condu, zero_shot]
            training: {lr: 1e-4, task_lr: {digits: 5e-5}, betas: [0.8, 0.99]}
            voting: {preset: code, k: 2}
            mixed_precision: no
            """,
        )
    )
    assert config.methods == ("condu", "zero_shot")
    assert config.training.learning_rate_of("digits") == 5e-5
    assert config.training.learning_rate_of("letters") == 1e-4
    assert config.mixed_precision == "no"  # YAML reads it as false
    voting = config.voting.voting()
    assert (voting.k, voting.include_pretrained, voting.space) == (2, True, "logits")
    assert load_config(write(tmp_path, config.to_yaml())) == config


def test_what_is_not_given_is_the_default(tmp_path: Path) -> None:
    assert load_config(write(tmp_path, "benchmark: {name: mini}")) == RunConfig()


def test_the_demo_runs_all_methods_on_the_mini_benchmark() -> None:
    config = demo_config()
    assert (config.benchmark.name, config.model.name) == ("mini", "mini")
    assert set(config.methods) >= {"zero_shot", "individual", "sequential", "condu"}


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({"sed": 1}, "unknown key 'sed', did you mean 'seed'?"),
        ({"training": {"step": 1}}, "unknown key 'training.step', did you mean 'steps'?"),
        ({"training": {"zzz": 1}}, "unknown key 'training.zzz'"),
        ({"training": {"steps": 0}}, "training.steps: input should be greater than or equal to 1"),
        ({"training": {"steps": "many"}}, "training.steps: .*integer.*'many'"),
        ({"training": {"lr": -1}}, "training.lr: .*greater than 0, got -1"),
        ({"training": {"lr": float("inf")}}, "training.lr: .*finite number"),
        ({"training": {"warmup": 1}}, "training.warmup: .*less than 1, got 1"),
        ({"training": {"betas": [0.9, 1]}}, "training.betas: .*less than 1, got .0.9, 1.0."),
        ({"training": {"task_lr": {"a": 0}}}, "training.task_lr: task 'a': .* got 0"),
        ({"fusion": {"zero_sum": "minus"}}, "fusion.zero_sum: .*'negative'.*got 'minus'"),
        ({"fusion": {"state_dtype": "float16"}}, "fusion.state_dtype: .*got 'float16'"),
        ({"voting": {"preset": "best"}}, "voting.preset: .*got 'best'"),
        ({"voting": {"k": 0}}, "voting.k: .*got 0"),
        ({"methods": ["condo"]}, "methods: unknown method 'condo', there are: .*condu"),
        ({"methods": ["condu", "condu"]}, "methods: 'condu' is listed twice"),
        ({"methods": []}, "methods: .*at least 1 item"),
        ({"methods": ["individual"], "protocols": ["agnostic"]}, "'individual' needs .*'?task-id"),
        ({"protocols": ["oracle"]}, "protocols.0: .*got 'oracle'"),
        ({"mixed_precision": "int8"}, "mixed_precision: .*got 'int8'"),
    ],
)
def test_a_wrong_value_is_named_in_one_line(values: dict[str, Any], expected: str) -> None:
    with pytest.raises(ConfigError, match=expected) as caught:
        make_config(values)
    assert "\n" not in str(caught.value)


def test_all_problems_are_reported(tmp_path: Path) -> None:
    path = write(tmp_path, "sed: 1\ntraining: {steps: 0}")
    with pytest.raises(ConfigError, match=r"run\.yaml: .*training\.steps.*; .*'sed'"):
        load_config(path)


@pytest.mark.parametrize("text", ["- a\n- b", "seed: [1", "42"])
def test_what_is_not_a_configuration_is_refused(tmp_path: Path, text: str) -> None:
    with pytest.raises(ConfigError, match=r"run\.yaml: "):
        load_config(write(tmp_path, text))


def test_difference_names_the_key_and_both_values() -> None:
    config = RunConfig()
    assert difference(config, RunConfig()) is None
    other = make_config({"training": {"task_lr": {"digits": 0.5}}})
    assert difference(config, make_config({"seed": 7})) == "seed was 42 and is now 7"
    assert difference(config, other) == "training.task_lr.digits was None and is now 0.5"


def test_configurations_that_come_with_the_package_are_found_by_name_unless_a_file_is_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert load_config(find_config(Path("configs/mini.yaml"))) == demo_config()
    vqa = load_config(find_config(Path("configs/mini_vqa_pam.yaml")))
    assert vqa.benchmark.name == vqa.model.name == "mini_vqa"
    packaged = find_config(Path("configs/mini.yaml"))
    assert find_config(Path("mini.yaml")) == find_config(Path("mini")) == packaged
    Path("configs").mkdir()
    own = Path("configs/mini.yaml")
    own.write_text("benchmark: {name: mini}\nseed: 7")
    assert load_config(find_config(own)).seed == 7


def test_adapters_train_as_all_weights_do_but_for_what_is_said_of_them() -> None:
    full = TrainingConfig(steps=7, batch_size=5, lr=0.1, task_lr={"a": 0.2}, warmup=0.3)
    assert LoraConfig(lr=0.5).training(full) == full.model_copy(update={"lr": 0.5, "task_lr": {}})
    given = LoraConfig(lr=0.5, steps=3, task_lr={"b": 0.4}).training(full)
    assert (given.steps, given.learning_rate_of("a"), given.learning_rate_of("b")) == (3, 0.5, 0.4)
    assert given.batch_size == 5


@pytest.mark.parametrize("name", ["configs/typo.yaml", "typo", "else/mini.yaml"])
def test_a_configuration_that_is_nowhere_is_named_with_those_that_there_are(name: str) -> None:
    with pytest.raises(ConfigError, match=f"^{name} is no file.*: folders_condu, mini, mini_vqa"):
        find_config(Path(name))


@pytest.mark.parametrize("text", ["", "seed: 1", "benchmark: {root: data}"])
def test_a_file_says_which_benchmark_it_is_for(tmp_path: Path, text: str) -> None:
    with pytest.raises(ConfigError, match=r"yaml: benchmark\.name is missing: mini, mini_vqa, fol"):
        load_config(write(tmp_path, text))


def test_a_wrong_entry_of_a_list_is_one_problem() -> None:
    with pytest.raises(ConfigError, match=r"got 'taskid'$") as error:
        make_config({"protocols": ["taskid"]})
    assert ";" not in str(error.value)
    with pytest.raises(ConfigError, match="protocols: tuple should have at least 1 item"):
        make_config({"protocols": []})
