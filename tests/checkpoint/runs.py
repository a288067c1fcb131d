"""Small models in files, and the commands on them as functions for a process of their own.

With the sizes of files and units that are set here every command writes several shards of several
units, and tensors are cut between units.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from faults import Disk
from safetensors.torch import save_file
from torch import Tensor

from condu import checkpoint
from condu.checkpoint import Options, memory, watch
from condu_ext import storage
from condu_ext.layout import CHUNK

TASKS = ("a", "b", "c")
SHARD_BYTES = 600_000
SHAPES = {
    "first": (300, 41),
    "long": (5, CHUNK + 7),
    "none": (0, 4),
    "whole": (2, CHUNK),
    "scalar": (),
    "last": (100_003,),
    "bias": (17,),
}


def values(seed: int) -> dict[str, Tensor]:
    """A model: seed 0 is the base, the others are fine-tuned from it."""
    generator = torch.Generator().manual_seed(0)
    base = {n: torch.randn(shape, generator=generator) for n, shape in SHAPES.items()}
    if not seed:
        return base
    generator.manual_seed(seed)
    return {n: t + 0.01 * torch.randn(t.shape, generator=generator) for n, t in base.items()}


def save(tensors: Mapping[str, Tensor], folder: Path) -> None:
    """A model in a folder of three files, with an index and something else beside them."""
    folder.mkdir(parents=True)
    names = list(tensors)
    listed = {}
    for number, group in enumerate((names[:1], names[1:3], names[3:]), start=1):
        file = f"model-{number:05}-of-00003.safetensors"
        save_file({name: tensors[name] for name in group}, folder / file, {"format": "pt"})
        listed |= dict.fromkeys(group, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": listed}))
    (folder / "config.json").write_text("{}")
    (folder / "processor").mkdir()
    (folder / "processor" / "words.txt").write_text("a b c")


def make_models(folder: Path) -> None:
    """``base`` and a folder for each of the TASKS."""
    for seed, name in enumerate(("base", *TASKS)):
        save(values(seed), folder / name)


class Commands:
    """Commands on the models of a folder; ``out`` is what they write, of that name beside them."""

    def __init__(self, folder: Path, workers: int = 2, unit: int = CHUNK) -> None:
        self.folder, self.workers, self.unit = folder, workers, unit

    def run(
        self, name: str, out: Path, disk: tuple[Any, ...] = (), silence: float = 20.0
    ) -> dict[str, Any]:
        """Do a command with a :class:`Disk` made of ``disk``; what was counted and reported."""
        storage.SHARD_BYTES = SHARD_BYTES
        memory._BEST = self.unit
        watch._SILENCE = silence
        lines: list[str] = []
        options = Options(workers=self.workers, report=lines.append)
        watched = Disk(*disk)
        getattr(self, name)(out, options)
        return {"count": watched.count, "written": watched.written, "lines": lines}

    def run_in(self, max_memory: int, name: str, out: Path) -> None:
        """Do a command with so much memory."""
        getattr(self, name)(out, Options(workers=self.workers, max_memory=max_memory))

    def unify(self, out: Path, options: Options) -> None:
        tasks = {task: self.folder / task for task in TASKS}
        checkpoint.unify(self.folder / "base", tasks, out, options=options)

    def unify_two(self, out: Path, options: Options) -> None:
        tasks = {task: self.folder / task for task in TASKS[:2]}
        checkpoint.unify(self.folder / "base", tasks, out, options=options)

    def unify_third(self, out: Path, options: Options) -> None:
        tasks = {TASKS[2]: self.folder / TASKS[2]}
        checkpoint.unify(self.folder / "base", tasks, out, options=options)

    def absorb(self, out: Path, options: Options) -> None:
        task = TASKS[2]
        checkpoint.absorb(out, task, self.folder / task, base=self.folder / "base", options=options)

    def merge(self, out: Path, options: Options) -> None:
        checkpoint.merge(self.folder / "two", self.folder / "third", out, options=options)

    def extract(self, out: Path, options: Options) -> None:
        base = self.folder / "base"
        checkpoint.extract(self.folder / "two", "b", out, base=base, options=options)

    def before(self, name: str, out: Path) -> None:
        """Bring ``out`` to where it is before a command: only absorb, in place, needs it there."""
        if out.exists():
            shutil.rmtree(out)
        if name == "absorb":
            shutil.copytree(self.folder / "two", out)


def contents(folder: Path) -> dict[str, bytes]:
    """All files below a folder, the lock apart."""
    return {
        str(file.relative_to(folder)): file.read_bytes()
        for file in sorted(folder.rglob("*"))
        if file.is_file() and file.name != ".lock"
    }


def leftovers(folder: Path) -> list[str]:
    """Everything below a folder."""
    return sorted(str(file.relative_to(folder)) for file in folder.rglob("*"))
