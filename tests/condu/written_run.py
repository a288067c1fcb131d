"""Folders of finished runs without any training: numbers made up, files as a run leaves them."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file

from condu.config import make_config
from condu.metrics import summarize
from condu.prototypes import PrototypeSet

TASKS = ("hues", "tones", "shapes", "strokes")
METHODS = ("zero_shot", "individual", "zscl", "condu", "pam")
VOTING = ("condu",)
UNIFIED = ("condu",)
DIMENSION = 16


def results(
    *,
    benchmark: str = "mini",
    tasks: Sequence[str] = TASKS,
    methods: Sequence[str] = METHODS,
    protocols: Sequence[str] = ("task-id", "agnostic"),
    seed: int = 42,
    classes: int = 3,
    **settings: Any,
) -> dict[str, Any]:
    """What results.json holds, in numbers that depend on the seed. `settings` go into the
    configuration."""
    draw = np.random.default_rng(seed)
    if benchmark == "mtil":
        settings.setdefault("benchmark", {"root": "data"})
    wanted = {"name": benchmark, **settings.pop("benchmark", {})}
    configuration = make_config({"benchmark": wanted, "methods": methods, "seed": seed, **settings})
    return {
        "format": 2,
        "benchmark": benchmark,
        "seed": seed,
        "tasks": list(tasks),
        "classes": {task: [f"{task} {n}" for n in range(classes)] for task in tasks},
        "images": {task: {"train": 90, "test": 40 + n} for n, task in enumerate(tasks)},
        "methods": {
            name: _method(draw, name, len(tasks), list(tasks), protocols) for name in methods
        },
        "configuration": configuration.model_dump(mode="json"),
        "versions": {"condu": "0.1.0", "torch": "2.9.1"},
        "machine": {"cpus": 2, "threads": 1},
    }


def write_run(folder: Path, found: dict[str, Any], *, features: int | None = 20) -> Path:
    """A run's folder with these results; `features`: images of each task in the sample, None where
    the run kept none."""
    folder.mkdir(parents=True)
    (folder / "results.json").write_text(json.dumps(found))
    if features is None:
        return folder
    generator = torch.Generator().manual_seed(found["seed"])
    prototypes, sample = PrototypeSet(), {}
    for position, (task, names) in enumerate(found["classes"].items()):
        centres = torch.nn.functional.normalize(
            torch.randn(1, DIMENSION, generator=generator)
            + 0.5 * torch.randn(len(names), DIMENSION, generator=generator)
        )
        labels = torch.arange(max(features, len(names))) % len(names)
        images = centres[labels] + 0.1 * torch.randn(len(labels), DIMENSION, generator=generator)
        prototypes.add(task, images, labels, centres)
        sample[f"{position}.features"] = torch.nn.functional.normalize(images)[:features]
        sample[f"{position}.labels"] = labels[:features]
    prototypes.save(folder / "prototypes.safetensors")
    save_file(sample, folder / "features.safetensors")
    return folder


def _method(
    draw: np.random.Generator, name: str, count: int, tasks: list[str], protocols: Sequence[str]
) -> dict[str, Any]:
    votes = name in VOTING
    sessions = [_session(draw, name, tasks[: n + 1]) for n in range(count)]
    return {
        "protocols": {
            protocol: _table(draw, count, votes)
            for protocol in protocols
            if votes or protocol == "task-id"
        },
        "seconds": {p: sum(s[p] for s in sessions) for p in ("train", "fuse", "evaluate")},
        "sessions": sessions,
    }


def _table(draw: np.random.Generator, count: int, votes: bool) -> dict[str, Any]:
    learnt = np.tril(np.ones((count, count)))
    matrix = (35 + 45 * learnt + draw.uniform(-8, 8, (count, count))).round(3).tolist()
    found: dict[str, Any] = {"matrix": matrix}
    found |= {k: None if math.isnan(v) else v for k, v in asdict(summarize(matrix)).items()}
    if votes:
        found["votes"] = [
            [
                [int(v) for v in draw.integers(0, 30, tasks) + 90 * (np.arange(tasks) == task)]
                for task in range(count)
            ]
            for tasks in range(1, count + 1)
        ]
    return found


def _session(draw: np.random.Generator, name: str, tasks: Sequence[str]) -> dict[str, Any]:
    fused = None
    if name in UNIFIED:
        fused = {
            "bytes": 600_000 + 18_000 * len(tasks),
            "tasks": {
                task: {
                    "rescaler": 1 / len(tasks) ** 0.3,
                    "density": 1 / (1 + 0.2 * len(tasks)) + draw.uniform(0, 0.02),
                    "relative_l2": 1 - 1 / len(tasks),
                    "cosine": 1 / len(tasks) ** 0.5,
                }
                for task in tasks
            },
        }
    return {
        "train": float(draw.uniform(5, 9)),
        "fuse": float(draw.uniform(0.01, 0.02)),
        "evaluate": float(draw.uniform(1, 2)),
        "peak_bytes": {
            phase: {"host": int(draw.integers(8e8, 9e8)), "device": None}
            for phase in ("train", "fuse", "evaluate")
        },
        "misaligned": float(draw.uniform(0.1, 0.3)) if name == "pam" and len(tasks) > 1 else None,
        "fused": fused,
    }
