"""``config.json`` of a unified checkpoint: what it says, and reading it without trusting it.

The file is the one commit point of a checkpoint (:mod:`condu_ext.storage`). It lists the tasks
with their sums and rescalers, the fused tensors, and every data file with size and checksum.
"""

from __future__ import annotations

import json
import re
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from condu_ext.layout import ModelSpec, TensorSpec
from condu_ext.rule import FusionRule

FORMAT = "condu-unified-delta"
FORMAT_VERSION = 1
CONFIG = "config.json"

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
VIA = {None: None, "bfloat16": torch.bfloat16, "float16": torch.float16}
DATA_FILE = re.compile(
    r"(unified-(\d+)|triggers-(\d+)-\d+|private-(\d+)-\d+)-\d{5}-of-\d{5}\.safetensors"
)


class CheckpointError(ValueError):
    """A checkpoint that cannot be read; the message names the file and what is wrong with it."""


def generation_of(filename: str) -> int | None:
    """Generation in the name of one of a checkpoint's data files; None for any other file."""
    match = DATA_FILE.fullmatch(filename)
    return int(next(g for g in match.groups()[1:] if g)) if match else None


@dataclass(frozen=True)
class TaskEntry:
    """A task: its number in file names, its sums and rescalers by position of the tensor."""

    name: str
    number: int
    num: list[float]
    den: list[float]
    rescaler: list[float]


@dataclass(frozen=True)
class Manifest:
    """The content of ``config.json``.

    ``zero_sums``: of each tensor, by position, how many elements the last fusion elected a sign for
    by ``rule.zero_sum``, for their total was exactly 0 though some model had moved; None if they
    were not counted.
    """

    generation: int
    shards: int
    spec: ModelSpec
    dtype: torch.dtype
    rule: FusionRule
    tasks: list[TaskEntry]
    base_name: str | None
    base_fingerprints: dict[str, str]
    files: dict[str, dict[str, Any]]
    library_version: str
    zero_sums: list[int] | None = None

    def to_json(self) -> str:
        """The file's text."""
        return json.dumps(
            {
                "format": FORMAT,
                "format_version": FORMAT_VERSION,
                "library_version": self.library_version,
                "generation": self.generation,
                "shards": self.shards,
                "dtype": _name_of(DTYPES, self.dtype),
                "rule": asdict(self.rule),
                "tasks": [asdict(task) for task in self.tasks],
                "tensors": [
                    {
                        "name": t.name,
                        "shape": list(t.shape),
                        "order": list(t.order),
                        "via": _name_of(VIA, t.via),
                    }
                    for t in self.spec.tensors
                ],
                "aliases": dict(self.spec.aliases),
                "fixed": sorted(self.spec.fixed),
                "private": list(self.spec.private),
                "private_names": sorted(self.spec.private_names),
                "base": {"name": self.base_name, "xxh3": self.base_fingerprints},
                "zero_sums": self.zero_sums,
                "files": self.files,
            },
            indent=1,
        )


def _name_of(table: dict[Any, Any], value: object) -> Any:
    return next(name for name, known in table.items() if known == value)


class _Reader:
    """Typed access to parsed JSON; every complaint names the file and the key."""

    def __init__(self, path: Path, values: Any, where: str = "") -> None:
        if not isinstance(values, dict):
            raise CheckpointError(f"{path}: {where or 'the file'} is not a JSON object")
        self.path, self.values, self.where = path, values, where

    def complain(self, key: str, what: str) -> CheckpointError:
        return CheckpointError(f"{self.path}: {self.where}{key!r} {what}")

    def get(self, key: str, kind: type | tuple[type, ...]) -> Any:
        if key not in self.values:
            raise self.complain(key, "is missing")
        value = self.values[key]
        if not isinstance(value, kind) or isinstance(value, bool):
            raise self.complain(key, f"has the unexpected value {value!r:.80}")
        return value

    def count(self, key: str) -> int:
        if (value := self.get(key, int)) < 0:
            raise self.complain(key, f"is negative: {value}")
        return int(value)

    def one_of(self, key: str, table: dict[Any, Any]) -> Any:
        value = self.get(key, (str, type(None)))
        if value not in table:
            raise self.complain(key, f"is {value!r}, known: {', '.join(map(str, table))}")
        return table[value]

    def strings(self, key: str) -> list[str]:
        values = self.get(key, list)
        if not all(isinstance(v, str) for v in values):
            raise self.complain(key, "is not a list of strings")
        return list(values)

    def string_map(self, key: str) -> dict[str, str]:
        values = self.get(key, dict)
        if not all(isinstance(v, str) for v in values.values()):
            raise self.complain(key, "does not map names to strings")
        return dict(values)

    def objects(self, key: str) -> list[_Reader]:
        return [
            _Reader(self.path, value, f"{key}[{i}].") for i, value in enumerate(self.get(key, list))
        ]

    def floats(self, key: str, length: int, dtype: torch.dtype) -> list[float]:
        values = self.get(key, list)
        largest = torch.finfo(dtype).max
        if len(values) != length or not all(
            isinstance(v, (int, float)) and not isinstance(v, bool) and 0 <= v <= largest
            for v in values
        ):
            raise self.complain(key, f"is not a list of {length} numbers of {dtype} from 0 on")
        return [float(v) for v in values]


def read_manifest(directory: Path) -> Manifest:
    """Read and check ``config.json``.

    Raises:
        FileNotFoundError: there is no such file.
        CheckpointError: not our format, an unknown version, or a value that makes no sense.
    """
    path = directory / CONFIG
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise FileNotFoundError(f"{directory} holds no unified checkpoint ({CONFIG})") from None
    except (ValueError, RecursionError) as error:  # also of text that is no UTF-8
        raise CheckpointError(f"{path}: not valid JSON ({error})") from None
    reader = _Reader(path, values)
    if reader.values.get("format") != FORMAT:
        raise CheckpointError(f"{path}: not a unified checkpoint (format is not {FORMAT!r})")
    if reader.values.get("format_version") != FORMAT_VERSION:
        raise CheckpointError(
            f"{path}: format version {reader.values.get('format_version')!r} is unknown; this "
            f"version of condu reads {FORMAT_VERSION}"
        )
    spec = _read_spec(reader)
    rule = _Reader(path, reader.get("rule", dict), "rule.")
    try:
        fusion_rule = FusionRule(rule.get("zero_sum", str), rule.get("rescale", str))
    except ValueError as error:
        raise CheckpointError(f"{path}: {error}") from None
    base = _Reader(path, reader.get("base", dict), "base.")
    files = _read_files(reader)
    if not 1 <= (shards := reader.count("shards")) <= len(files):
        raise reader.complain("shards", f"is {shards!r:.20}, with {len(files)} data files")
    return Manifest(
        generation=reader.count("generation"),
        shards=shards,
        spec=spec,
        dtype=reader.one_of("dtype", DTYPES),
        rule=fusion_rule,
        tasks=_read_tasks(reader, len(spec.tensors)),
        base_name=base.get("name", (str, type(None))),
        base_fingerprints=base.string_map("xxh3"),
        files=files,
        library_version=reader.get("library_version", str),
        zero_sums=_read_zero_sums(reader, spec),
    )


def _read_spec(reader: _Reader) -> ModelSpec:
    tensors = []
    for entry in reader.objects("tensors"):
        shape = entry.get("shape", list)
        if not all(isinstance(n, int) and not isinstance(n, bool) and n >= 0 for n in shape):
            raise entry.complain("shape", f"is {shape}")
        tensors.append(
            TensorSpec(
                entry.get("name", str),
                tuple(shape),
                _read_order(entry, len(shape)),
                entry.one_of("via", VIA),
            )
        )
    names = [t.name for t in tensors]
    if len(set(names)) != len(names):
        raise reader.complain("tensors", "names a tensor twice")
    aliases = reader.string_map("aliases")
    if not set(aliases.values()) <= set(names) or set(aliases) & set(names):
        raise reader.complain("aliases", "does not fit the tensors")
    return ModelSpec(
        tuple(tensors),
        aliases,
        frozenset(reader.strings("fixed")),
        tuple(reader.strings("private")),
        frozenset(reader.strings("private_names")),
    )


def _read_order(entry: _Reader, dimensions: int) -> tuple[int, ...]:
    order = entry.get("order", list)
    if not all(type(dim) is int for dim in order) or sorted(order) != list(range(dimensions)):
        name = entry.get("name", str)
        raise entry.complain(
            "order", f"of {name!r} is no order of {dimensions} dimensions: {order!r:.80}"
        )
    return tuple(order)


def _read_tasks(reader: _Reader, tensors: int) -> list[TaskEntry]:
    tasks = [
        TaskEntry(
            entry.get("name", str),
            entry.count("number"),
            entry.floats("num", tensors, torch.float64),
            entry.floats("den", tensors, torch.float64),
            entry.floats("rescaler", tensors, torch.float32),
        )
        for entry in reader.objects("tasks")
    ]
    for what in ("name", "number"):
        values = [getattr(task, what) for task in tasks]
        if len(set(values)) != len(values) or "" in values:
            raise reader.complain("tasks", f"gives a {what} twice, or an empty one")
    return tasks


def _read_zero_sums(reader: _Reader, spec: ModelSpec) -> list[int] | None:
    if reader.values.get("zero_sums") is None:  # not counted, or written before there were any
        return None
    counts, numels = reader.get("zero_sums", list), [entry.numel for entry in spec.tensors]
    if len(counts) != len(numels) or not all(
        type(count) is int and 0 <= count <= numel
        for count, numel in zip(counts, numels, strict=True)
    ):
        raise reader.complain("zero_sums", "does not count elements of the tensors")
    return list(counts)


def _read_files(reader: _Reader) -> dict[str, dict[str, Any]]:
    files = {}
    for name, value in reader.get("files", dict).items():
        if not DATA_FILE.fullmatch(name):
            raise CheckpointError(f"{reader.path}: {name!r} is not the name of a data file")
        entry = _Reader(reader.path, value, f"files[{name}].")
        files[name] = {"size": entry.count("size"), "xxh3": entry.get("xxh3", str)}
    return files
