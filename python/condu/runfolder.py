"""The folder of a run, and how it survives a kill.

    RUN/config.yaml          the complete configuration, written first
    RUN/progress.json        accuracy rows and seconds so far: the record of what has been done
    RUN/finetuned/…          one fine-tuned model a task
    RUN/lora-<rank>/…        one fine-tuned adapter a task
    RUN/prototypes.safetensors
    RUN/<method>/…           what a method keeps, e.g. the unified model
    RUN/results.json         written when the last task is done

Every file is written beside its place, flushed to disk and renamed, so a reader sees the old one or
the new one, never half.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from condu.config import RunConfig, difference, load_config
from condu_ext.files import PART, replace


class RunFolderError(ValueError):
    """A run folder that cannot be started in or resumed; the message says why and what to do."""


@dataclass
class MethodProgress:
    """Rows of the accuracy matrix by protocol, one for each learnt task, and seconds so far; of
    merged adapters the share of misaligned weights, one number a task from the second on."""

    rows: dict[str, list[list[float]]]
    train: float = 0.0
    fuse: float = 0.0
    evaluate: float = 0.0
    misaligned: list[float] = field(default_factory=list)

    @property
    def learned(self) -> int:
        """Number of tasks learnt and evaluated."""
        return min(len(rows) for rows in self.rows.values())


@dataclass
class Progress:
    """What `progress.json` holds."""

    tasks: list[str]
    methods: dict[str, MethodProgress] = field(default_factory=dict)


class RunFolder:
    """A run's folder at `path`; `create` and `resume` make one, the constructor only names it."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)

    @classmethod
    def create(cls, path: str | os.PathLike[str], config: RunConfig) -> RunFolder:
        """Start a run in a folder that is new or empty; `RunFolderError` otherwise."""
        run = cls(path)
        if run.path.exists() and not _is_empty_folder(run.path):
            raise RunFolderError(
                f"{run.path} exists and is not an empty folder: go on with --resume, or choose "
                "another --out"
            )
        run.path.mkdir(parents=True, exist_ok=True)
        write_text(run.config_file, config.to_yaml())
        return run

    @classmethod
    def resume(cls, path: str | os.PathLike[str], config: RunConfig) -> RunFolder:
        """Go on in a folder that `create` made with the same configuration. A folder that is new or
        empty is started; `RunFolderError` names the first key that differs."""
        run = cls(path)
        if not run.config_file.exists():  # killed before the first write, or never started
            return cls.create(path, config)
        changed = difference(load_config(run.config_file), config)
        if changed:
            raise RunFolderError(f"{run.path} was begun with another configuration: {changed}")
        return run

    @property
    def config_file(self) -> Path:
        return self.path / "config.yaml"

    @property
    def results_file(self) -> Path:
        return self.path / "results.json"

    def load_progress(self, tasks: Sequence[str]) -> Progress:
        """What has been done so far. `RunFolderError` if it was done for other tasks."""
        file = self.path / "progress.json"
        if not file.exists():
            return Progress(list(tasks))
        values = json.loads(file.read_text(encoding="utf-8"))
        if values["tasks"] != list(tasks):
            raise RunFolderError(
                f"{self.path} holds a run over the tasks {', '.join(values['tasks'])}, "
                f"not {', '.join(tasks)}"
            )
        methods = {name: MethodProgress(**method) for name, method in values["methods"].items()}
        return Progress(list(tasks), methods)

    def save_progress(self, progress: Progress) -> None:
        write_text(self.path / "progress.json", json.dumps(asdict(progress), indent=1))

    def save_results(self, results: dict[str, Any]) -> None:
        write_text(self.results_file, json.dumps(results, indent=1, allow_nan=False))

    def load_results(self) -> dict[str, Any]:
        """The results of a finished run; `RunFolderError` if there are none."""
        if not self.results_file.exists():
            state = (
                "has not finished" if self.config_file.exists() else "is not the folder of a run"
            )
            raise RunFolderError(f"{self.path} {state}: there is no results.json in it")
        results = json.loads(self.results_file.read_text(encoding="utf-8"))
        if not isinstance(results, dict):
            raise RunFolderError(f"{self.results_file} does not hold the results of a run")
        return results


def write_text(path: Path, text: str) -> None:
    """Write a text file as one step."""
    replace(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


def _is_empty_folder(path: Path) -> bool:
    """True also if all there is was being written when the process was killed."""
    return path.is_dir() and all(entry.suffix == PART for entry in path.iterdir())
