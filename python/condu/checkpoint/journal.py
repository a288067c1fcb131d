"""What a killed run had finished: a line a shard, from where the same command goes on.

``.unfinished-<rank>.jsonl`` beside the files that are being written. Each line is a finished shard:
which job it belongs to (a digest of everything that the result depends on), the generation of its
files, the sums of its tensors, and size and checksum of its files, which were on disk before the
line was written. A line that a kill cut short is no line.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from condu_ext.files import naming

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

    def fits(self, sizes: Mapping[str, int], rows: int, tensors: int) -> bool:
        """Whether it is of a shard with files of these sizes, so many tensors and rows of sums."""
        return (
            {name: entry["size"] for name, entry in self.files.items()} == sizes
            and [len(row) for row in self.sums] == [tensors] * rows
            and len(self.zero_sums) == len(self.base) == tensors
        )


class Journal:
    """The lines of one process, of one run of a job."""

    def __init__(self, folder: Path, rank: int, job: str, generation: int) -> None:
        self._run = {"job": job, "generation": generation}
        self._path = folder / _PATTERN.format(rank)
        # without a buffer, for what a full disk leaves in one fails once more on close
        self._file = open(self._path, "ab", buffering=0)  # noqa: SIM115 (closed by close)
        self._torn = self._file.tell() > 0  # perhaps, by a kill

    def add(self, shard: int, record: Record) -> None:
        """Note a finished shard, whose files are on disk.

        Raises:
            OSError: naming the journal; the disk is full, and so on.
        """
        line = json.dumps(self._run | {"shard": shard, **asdict(record)}) + "\n"
        rest = memoryview(("\n" * self._torn + line).encode())
        self._torn = True
        with naming(self._path):
            while rest:
                rest = rest[self._file.write(rest) :]
            os.fsync(self._file.fileno())

    def close(self) -> None:
        self._file.close()


def journals(folder: Path) -> list[Path]:
    """The journals in a folder."""
    return sorted(folder.glob(_PATTERN.format("*")))


def read_journals(folder: Path, job: str) -> tuple[int | None, dict[int, Record]]:
    """The generation of an unfinished run of this job, and the shards that it finished: None and
    nothing where there is none."""
    generation: int | None = None
    finished: dict[int, Record] = {}
    for line in (line for file in journals(folder) for line in _lines(file)):
        try:
            if line.pop("job") != job:
                continue
            of = int(line.pop("generation"))
            shard, record = int(line.pop("shard")), Record(**line)
        except (KeyError, TypeError, ValueError):  # nothing that this class wrote
            continue
        if generation is None or of == generation:
            generation = of
            finished[shard] = record
    return generation, finished


def _lines(file: Path) -> Iterator[dict[str, Any]]:
    with open(file, encoding="utf-8", errors="replace") as lines:
        for text in lines:
            try:
                line = json.loads(text)
            except (ValueError, RecursionError):
                continue
            if isinstance(line, dict):
                yield line
