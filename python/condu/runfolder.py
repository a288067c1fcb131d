"""The folder of a run, and how it survives a kill.

    RUN/config.yaml          the complete configuration, written first
    RUN/progress.json        the sessions so far (`condu.record`): what has been done
    RUN/finetuned/…          one fine-tuned model a task
    RUN/lora-<rank>/…        one fine-tuned adapter a task
    RUN/prototypes.safetensors
    RUN/<method>/…           what a method keeps, e.g. the unified model
    RUN/tracking/…           what trackers keep, if there are any
    RUN/features.safetensors a sample of frozen features, of models that vote
    RUN/results.json         written when the last task is done

Every file is written beside its place, flushed to disk and renamed, so a reader sees the old one or
the new one, never half.
"""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

from pydantic import TypeAdapter, ValidationError

from condu.config import ConfigError, RunConfig, difference, load_config, make_config
from condu.record import FORMAT, Basis, Progress
from condu.results import Results
from condu_ext.files import PART, replace

T = TypeVar("T")

_PROGRESS = TypeAdapter(Progress)
_RESULTS = TypeAdapter(Results)


class RunFolderError(ValueError):
    """A run folder that cannot be started in or resumed; the message says why and what to do."""


class RunFolder:
    """A run's folder at `path`; `create` and `resume` make one, the constructor only names it."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)

    @classmethod
    def create(cls, path: str | os.PathLike[str], config: RunConfig) -> RunFolder:
        """Start a run in a folder that is new or empty; `RunFolderError` otherwise."""
        run = cls(path)
        run.check_unused()
        run.begin(config)
        return run

    @classmethod
    def resume(cls, path: str | os.PathLike[str], config: RunConfig) -> RunFolder:
        """Go on in a folder that `create` made with the same configuration. A folder that is new or
        empty is started; `RunFolderError` names the first key that differs."""
        run = cls(path)
        run.check_resumable(config)
        run.begin(config)
        return run

    def check_unused(self) -> None:
        """What `create` refuses, before anything is written."""
        if self.path.exists() and not _is_empty_folder(self.path):
            raise RunFolderError(
                f"{self.path} exists and is not an empty folder: go on with --resume, or choose "
                "another --out"
            )

    def check_resumable(self, config: RunConfig) -> None:
        """What `resume` refuses, before anything is written."""
        if not self.config_file.exists():  # killed before the first write, or never started
            self.check_unused()
        elif changed := difference(load_config(self.config_file), config):
            raise RunFolderError(f"{self.path} was begun with another configuration: {changed}")

    def begin(self, config: RunConfig) -> None:
        """Write the configuration, unless it is there."""
        if not self.config_file.exists():
            self.path.mkdir(parents=True, exist_ok=True)
            write_text(self.config_file, config.to_yaml())

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Held by the process that works in a folder that was begun; `RunFolderError` if another
        one does."""
        with open(self.config_file, "r+b") as file:  # which is never replaced
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise RunFolderError(f"{self.path}: another process works on this run") from None
            yield

    @property
    def config_file(self) -> Path:
        return self.path / "config.yaml"

    @property
    def results_file(self) -> Path:
        return self.path / "results.json"

    @property
    def feature_file(self) -> Path:
        return self.path / "features.safetensors"

    def load_progress(self, basis: Basis) -> Progress:
        """What has been done so far. `RunFolderError` if it was done over something else, or
        recorded in another format, and if the file is damaged."""
        file = self.path / "progress.json"
        if not file.exists():
            return Progress(basis)
        values = _read(file, "go on with the version of condu that began the run, or anew")
        progress = _checked(file, _PROGRESS, values)
        if changed := progress.basis.change(basis):
            raise RunFolderError(f"{self.path} holds a run over something else: {changed}")
        return progress

    def save_progress(self, progress: Progress) -> None:
        text = _PROGRESS.dump_json(progress, indent=1).decode()
        write_text(self.path / "progress.json", text)

    def save_results(self, results: dict[str, Any]) -> None:
        write_text(self.results_file, json.dumps(results, indent=1, allow_nan=False))

    def load_results(self) -> dict[str, Any]:
        """The results of a finished run, a `condu.results.Results` as JSON; `RunFolderError` if
        there are none, or in another format, and if the file is damaged."""
        if not self.results_file.exists():
            state = (
                "has not finished" if self.config_file.exists() else "is not the folder of a run"
            )
            raise RunFolderError(f"{self.path} {state}: there is no results.json in it")
        results = _read(self.results_file, "read it with the version that wrote it")
        _checked(self.results_file, _RESULTS, results)
        try:
            make_config(results["configuration"])
        except ConfigError as error:
            raise RunFolderError(f"{self.results_file} is damaged: {error}") from None
        return results


def write_text(path: Path, text: str) -> None:
    """Write a text file as one step."""
    replace(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


def _read(file: Path, advice: str) -> dict[str, Any]:
    """A JSON file of format `FORMAT`; `RunFolderError` for anything else, with `advice` where the
    format is another one."""
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:  # no JSON, or no UTF-8
        raise RunFolderError(f"{file} is damaged: {error}") from None
    if not isinstance(values, dict):
        raise RunFolderError(f"{file} is damaged: it holds a {type(values).__name__}, not a dict")
    found = values.get("format", 1)
    if found != FORMAT:
        raise RunFolderError(
            f"{file} has format {found}, but this version of condu knows format {FORMAT}: {advice}"
        )
    return values


def _checked(file: Path, schema: TypeAdapter[T], values: dict[str, Any]) -> T:
    """`values` by their types; `RunFolderError` names the first key that is missing or wrong."""
    try:
        return schema.validate_python(values)
    except ValidationError as error:
        problem = error.errors()[0]
        key = ".".join(map(str, problem["loc"]))
        raise RunFolderError(f"{file} is damaged: {key}: {problem['msg']}") from None


def _is_empty_folder(path: Path) -> bool:
    """True also if all there is was being written when the process was killed."""
    return path.is_dir() and all(entry.suffix == PART for entry in path.iterdir())
