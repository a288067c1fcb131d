"""The command `condu bench`: names in, table, JSON and picture out."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import torch

from condu.bench.baselines import BASELINES
from condu.bench.cases import OPERATIONS, Case, cases_of
from condu.bench.record import Record, record_of
from condu.bench.suite import WRONG, CaseResult, Settings, Suite
from condu.bench.table import lines_of
from condu_ext.files import replace


@dataclass(frozen=True)
class Preset:
    """What is measured where the options do not say."""

    models: str
    tasks: str
    repeats: int
    baselines: str
    copy_bytes: int | None


DEFAULT = Preset("ViT-B-16", "8", 9, ",".join(BASELINES), None)
QUICK = Preset("tiny", "2,8", 3, "straightforward,eager", 64 << 20)
"""Seconds instead of minutes: shows that everything works, not how fast it is."""


@dataclass(frozen=True)
class Options:
    """The options of the command as they were typed; None takes the preset's."""

    ops: str | None = None
    models: str | None = None
    tasks: str | None = None
    dtypes: str = "fp32"
    device: str | None = None
    repeats: int | None = None
    baselines: str | None = None
    quick: bool = False

    def cases(self) -> list[Case]:
        """What to measure. Raises ValueError naming a wrong value."""
        preset = self.preset
        return cases_of(
            _names(self.ops or ",".join(OPERATIONS)),
            _names(self.models or preset.models),
            _numbers(self.tasks or preset.tasks),
            _names(self.dtypes),
        )

    def settings(self) -> Settings:
        """How to measure it. Raises ValueError naming a wrong value."""
        preset = self.preset
        baselines = tuple(_names(preset.baselines if self.baselines is None else self.baselines))
        for name in baselines:
            if name not in BASELINES:
                raise ValueError(f"--baselines: unknown {name!r}; there are {', '.join(BASELINES)}")
        repeats = preset.repeats if self.repeats is None else self.repeats
        if repeats < 1:
            raise ValueError(f"--repeats: at least 1, not {repeats}")
        return Settings(
            _device(self.device), baselines, repeats=repeats, copy_bytes=preset.copy_bytes
        )

    @property
    def preset(self) -> Preset:
        return QUICK if self.quick else DEFAULT


def measure(options: Options, say: Callable[[str], None], folder: Path) -> Record:
    """Run the suite and return its record, which ``folder`` has after every case: nothing that
    was measured is lost when a later case ends the process.

    Raises:
        ValueError: an option's value; nothing is written then.
    """
    cases, settings = options.cases(), options.settings()
    suite = Suite(settings, say)
    folder.mkdir(parents=True, exist_ok=True)
    results: list[CaseResult] = []
    for result in suite.run(cases):
        results.append(result)
        record = record_of(settings, suite.copy, results)
        _save(record, folder / "bench.json")
    return record


def _save(record: Record, file: Path) -> None:
    text = json.dumps(record, indent=1) + "\n"
    replace(file, lambda part: part.write_text(text))


def wrong_results(record: Record) -> list[str]:
    """A line for each case whose kernel did not compute what the reference does."""
    return [case["reason"] for case in record["cases"] if case["status"] == WRONG]


def write(record: Record, folder: Path) -> Iterable[str]:
    """Write ``bench.json``, ``bench.md`` and, where matplotlib is installed, ``bench.png``.

    Yields one line for each, with its path or with the reason why it is not there."""
    folder.mkdir(parents=True, exist_ok=True)
    data, text, picture = (folder / f"bench.{end}" for end in ("json", "md", "png"))
    _save(record, data)
    yield str(data)
    replace(text, lambda part: part.write_text("\n".join(lines_of(record)) + "\n"))
    yield str(text)
    try:
        from condu.bench.plot import save_plot
    except ModuleNotFoundError as error:
        if error.name != "matplotlib":
            raise
        yield f'no {picture.name}: it needs matplotlib, which comes with "condu[train]"'
        return
    save_plot(record, picture)
    yield str(picture)


def _names(text: str) -> list[str]:
    return [name.strip() for name in text.split(",") if name.strip()]


def _numbers(text: str) -> list[int]:
    try:
        return [int(name) for name in _names(text)]
    except ValueError:
        raise ValueError(f"--tasks: expected numbers such as 2,8,16, not {text!r}") from None


def _device(name: str | None) -> torch.device:
    if name not in (None, "cpu", "cuda"):
        raise ValueError(f"--device: cpu or cuda, not {name!r}")
    if name == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda: torch finds no GPU here")
    return torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))
