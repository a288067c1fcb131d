"""What a run is made of: benchmark, model, methods, training, fusion, voting, seed.

A configuration is a YAML file. Every key is checked; an unknown key or a wrong value raises
`ConfigError`, whose one-line message names the file and the key. The sections are in
`condu.config_sections`.
"""

from __future__ import annotations

import difflib
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import Field, ValidationError, field_validator, model_validator

from condu.config_sections import (
    BenchmarkConfig,
    DpeclipIdConfig,
    EvaluationConfig,
    FusionConfig,
    LoraConfig,
    LwfConfig,
    ModelConfig,
    PamConfig,
    RailConfig,
    Section,
    TaskArithmeticConfig,
    TrainingConfig,
    VotingConfig,
    WiseFtConfig,
    ZsclConfig,
)
from condu.labels import Protocol

WITHOUT_EFFECT = ("benchmark.root", "benchmark.download", "evaluation.cache", "trackers")
"""Keys that change no number of a run."""


class ConfigError(ValueError):
    """A configuration that cannot be used; the message names the key and what it held."""


class RunConfig(Section):
    """Everything that decides the numbers of a run; device and processes come from `accelerate`.
    `trackers`: what shows the run while it goes on, see `condu.tracking`."""

    benchmark: BenchmarkConfig = BenchmarkConfig()
    model: ModelConfig = ModelConfig()
    methods: tuple[str, ...] = Field(
        default=("zero_shot", "individual", "sequential", "condu"), min_length=1
    )
    protocols: tuple[Protocol, ...] = Field(default=("task-id", "agnostic"), min_length=1)
    training: TrainingConfig = TrainingConfig()
    lora: LoraConfig = LoraConfig()
    pam: PamConfig = PamConfig()
    wise_ft: WiseFtConfig = WiseFtConfig()
    lwf: LwfConfig = LwfConfig()
    zscl: ZsclConfig = ZsclConfig()
    rail: RailConfig = RailConfig()
    task_arithmetic: TaskArithmeticConfig = TaskArithmeticConfig()
    dpeclip_id: DpeclipIdConfig = DpeclipIdConfig()
    fusion: FusionConfig = FusionConfig()
    voting: VotingConfig = VotingConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    seed: int = Field(default=42, ge=0)
    mixed_precision: Literal["no", "fp16", "bf16"] = "no"
    trackers: tuple[Literal["tensorboard", "wandb"], ...] = ()

    @field_validator("methods")
    @classmethod
    def _known_methods(cls, names: tuple[str, ...]) -> tuple[str, ...]:
        from condu.methods import METHODS  # the methods import this module

        for name in names:
            if name not in METHODS:
                raise ValueError(f"unknown method {name!r}, there are: {', '.join(METHODS)}")
        return _unique(names)

    @field_validator("protocols", "trackers")
    @classmethod
    def _listed_once(cls, names: tuple[str, ...]) -> tuple[str, ...]:
        return _unique(names)

    @model_validator(mode="after")
    def _something_to_measure(self) -> RunConfig:
        from condu.methods import METHODS

        for name in self.methods:
            offered = METHODS[name].protocols
            if not set(offered) & set(self.protocols):
                raise ValueError(
                    f"methods: {name!r} needs the protocol {' or '.join(offered)}, "
                    f"but protocols has only: {', '.join(self.protocols)}"
                )
        return self

    @field_validator("mixed_precision", mode="before")
    @classmethod
    def _yaml_no(cls, value: object) -> object:
        return "no" if value is False else value  # YAML reads a bare `no` as false

    def to_yaml(self) -> str:
        """The complete configuration, defaults included, as YAML that `load_config` reads back."""
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False)


def load_config(path: str | os.PathLike[str]) -> RunConfig:
    """Read and check a YAML file. Raises `ConfigError`, which names the file and the key, and
    `OSError` if there is no such file."""
    source = os.fspath(path)
    try:
        values = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{source}: not YAML: {' '.join(str(error).split())}") from None
    if values is None:
        values = {}
    if not isinstance(values, dict):
        raise ConfigError(f"{source}: must hold keys and values, found {type(values).__name__}")
    benchmark = values.get("benchmark") or {}
    unnamed = isinstance(benchmark, dict) and "name" not in benchmark
    # what else is wrong comes first, but of keys that only some benchmarks have nothing is known
    config = None if unnamed and benchmark else make_config(values, source)
    if unnamed or config is None:
        raise ConfigError(f"{source}: benchmark.name is missing: mini, mini_vqa, folders or mtil")
    return config


def find_config(path: Path) -> Path:
    """The file itself, or, where there is none, the one that comes with the package under that
    name: `configs/mini.yaml`, `mini.yaml` or `mini`. `ConfigError` if there is neither."""
    folder = Path(__file__).parent / "configs"
    packaged = folder / path.with_suffix(".yaml").name
    if path.exists():
        return path
    if path.parent in (Path(), Path("configs")) and packaged.is_file():
        return packaged
    names = ", ".join(sorted(file.stem for file in folder.glob("*.yaml")))
    raise ConfigError(f"{path} is no file, nor one that comes with the package: {names}")


def demo_config() -> RunConfig:
    """The configuration of `condu demo`, which comes with the package."""
    return load_config(find_config(Path("configs", "mini.yaml")))


def make_config(values: Mapping[str, Any], source: str = "config") -> RunConfig:
    """A checked configuration from a nested mapping; a `ConfigError` begins with `source`."""
    try:
        return RunConfig.model_validate(values)
    except ValidationError as error:
        found = error.errors()
        # of a list with a wrong entry pydantic also says that it is too short without it
        inner = {problem["loc"][:-1] for problem in found}
        problems = "; ".join(
            _explain(problem)
            for problem in found
            if problem["type"] != "too_short" or problem["loc"] not in inner
        )
        raise ConfigError(f"{source}: {problems}") from None


def difference(old: RunConfig, new: RunConfig) -> str | None:
    """The first key in which two configurations differ, with both values, or None. Where the data
    are and how they got there may differ."""
    values = dict(leaves(old.model_dump(mode="json")))
    others = dict(leaves(new.model_dump(mode="json")))
    for key in values | others:
        if values.get(key) != others.get(key) and key not in WITHOUT_EFFECT:
            return f"{key} was {values.get(key)!r} and is now {others.get(key)!r}"
    return None


def _unique(names: tuple[Any, ...]) -> tuple[Any, ...]:
    twice = [name for position, name in enumerate(names) if name in names[:position]]
    if twice:
        raise ValueError(f"{twice[0]!r} is listed twice")
    return names


def leaves(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """The values of nested sections, by dotted key."""
    for key, value in values.items():
        if isinstance(value, dict):
            yield from leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _explain(problem: Any) -> str:
    """One of pydantic's problems as `key: what is wrong`."""
    location = problem["loc"]
    key = ".".join(str(part) for part in location)
    if problem["type"] == "extra_forbidden":
        close = difflib.get_close_matches(str(location[-1]), _keys_at(location[:-1]), n=1)
        return f"unknown key {key!r}" + (f", did you mean {close[0]!r}?" if close else "")
    message = problem["msg"].removeprefix("Value error, ")
    if problem["type"] == "value_error":
        return f"{key}: {message}" if key else message
    return f"{key}: {message[0].lower()}{message[1:]}, got {problem['input']!r}"


def _keys_at(location: tuple[Any, ...]) -> list[str]:
    section: Any = RunConfig
    for part in location:
        section = section.model_fields[part].annotation
    return list(section.model_fields)
