"""What a killed run had finished: a line a shard, from where the same command goes on.

``.unfinished-<rank>.jsonl`` beside the files that are being written. The first line says which job
it belongs to (a digest of everything that the result depends on) and the generation of its files;
each further one is a finished shard: the sums of its tensors, and size and checksum of its files,
which were on disk before the line was written. A line that a kill cut short is no line.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

_PATTERN = ".unfinished-{}.jsonl"


@dataclass
class Record:
    """What there is to say of a finished shard.

    Attributes:
        files: name of each of its files → ``{"size": …, "xxh3": …}``.
        sums: per row of the kernel's chunk sums the sums of the shard's tensors.
        zero_sums: per tensor of the shard, how many elements the rule for total = 0 decided.
        base: per tensor the xxh3 of the base model's bytes; empty where there is no base.
    """

    files: dict[str, dict[str, Any]] = field(default_factory=dict)
    sums: list[list[float]] = field(default_factory=list)
    zero_sums: list[int] = field(default_factory=list)
    base: list[str] = field(default_factory=list)


class Journal:
    """The lines of one process; opened for one job."""

    def __init__(self, folder: Path, rank: int, job: str, generation: int) -> None:
        self._file = open(  # noqa: SIM115 (closed by close)
            folder / _PATTERN.format(rank), "a", encoding="utf-8"
        )
        if self._file.tell() == 0:
            self._write({"job": job, "generation": generation})
        else:
            self._file.write("\n")  # after a line that a kill cut short

    def add(self, shard: int, record: Record) -> None:
        """Note a finished shard, whose files are on disk."""
        self._write({"shard": shard, **asdict(record)})

    def close(self) -> None:
        self._file.close()

    def _write(self, line: Mapping[str, Any]) -> None:
        self._file.write(json.dumps(line) + "\n")
        self._file.flush()
        os.fsync(self._file.fileno())


def journals(folder: Path) -> list[Path]:
    """The journals in a folder."""
    return sorted(folder.glob(_PATTERN.format("*")))


def read_journals(folder: Path, job: str) -> tuple[int | None, dict[int, Record]]:
    """The generation of an unfinished run of this job, and the shards that it finished; None where
    there is none, or one of another job."""
    generation: int | None = None
    finished: dict[int, Record] = {}
    for file in journals(folder):
        lines = _lines(file)
        if not lines:
            continue
        try:
            if lines[0]["job"] != job or generation not in (None, lines[0]["generation"]):
                return None, {}
            generation = int(lines[0]["generation"])
            finished |= {int(line.pop("shard")): Record(**line) for line in lines[1:]}
        except (KeyError, TypeError, ValueError):  # nothing that this class wrote
            return None, {}
    return generation, finished


def _lines(file: Path) -> list[dict[str, Any]]:
    found = []
    for text in file.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            found.append(json.loads(text))
        except ValueError:
            continue
    return [line for line in found if isinstance(line, dict)]
