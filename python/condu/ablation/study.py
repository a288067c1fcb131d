"""All variants over the fine-tuned models that a run left."""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator

from condu.ablation.answers import SessionAnswers
from condu.ablation.fusing import Fusing
from condu.ablation.ground import Ground
from condu.ablation.models import finetuned_models
from condu.ablation.tables import markdown
from condu.ablation.unfinished import Unfinished
from condu.ablation.variants import Variant, variants
from condu.config import ConfigError, load_config
from condu.labels import Protocol
from condu.metrics import summarize
from condu.progress import RunProgress
from condu.record import versions
from condu.runfolder import RunFolder, RunFolderError, write_text
from condu.trainer import ContinualTrainer
from condu.workspace import Workspace

PROTOCOLS: tuple[Protocol, ...] = ("task-id", "agnostic")


@dataclass
class Measured:
    """Of one variant: by protocol one row of accuracies for each session that was evaluated, and,
    over all tasks after the first, how many elements of the new delta were not 0, and of how many
    of these the sum with the old ones was exactly 0."""

    variant: Variant
    matrices: dict[Protocol, list[list[float]]] = field(
        default_factory=lambda: {protocol: [] for protocol in PROTOCOLS}
    )
    ties: int = 0
    moved: int = 0


def ablate(
    folder: str | os.PathLike[str],
    *,
    last: bool = False,
    out: str | os.PathLike[str] | None = None,
    progress: RunProgress | None = None,
) -> dict[str, Any]:
    """Fuse the fine-tuned models of the run in ``folder`` in sequence, once for each variant, and
    evaluate all data sets after every task, or, with ``last``, after the last one only. The default
    is what the run's configuration says of fusion and voting; nothing in the folder is changed.

    Into the folder ``out``, if one is given, go ``ablation.json`` and the table as ``ablation.md``,
    and before that what is measured of each fusion as soon as it is, see `Unfinished`: after an
    interruption the same call goes on.

    Returns what ``ablation.json`` holds: ``rows``, the default first, each with ``group``,
    ``name``, ``settings``, ``ties`` (see `Measured`; a share, null with a single task) and under
    ``protocols`` for each of them ``matrix`` in percent (with ``last`` its final row alone),
    ``transfer``, ``average`` and ``last``, null where they were not measured or are not defined.

    Raises `RunFolderError` if the folder is not that of a run or lacks fine-tuned models,
    `ConfigError` if its model cannot vote, and ValueError for models that are not the run's.
    """
    progress = progress or RunProgress()
    began = time.perf_counter()
    workspace = _workspace(Path(folder), progress)
    config, tasks = workspace.config, len(workspace.benchmark)
    models = finetuned_models(workspace)
    rule = config.fusion.rule()
    fusing = Fusing(rescale=rule.rescale, zero_sum=rule.zero_sum)
    every = variants(Variant("default", "condu", fusing, config.voting.voting()), tasks)
    # variants that share their experts are measured together
    sharing: dict[tuple[bool, Fusing], list[Variant]] = {}
    for variant in every:
        sharing.setdefault((variant.half, variant.fusing), []).append(variant)
    kept = Unfinished(None if out is None else Path(out), config, models, last=last)
    began -= kept.seconds
    if kept.rows:
        progress.line(f"{len(kept.rows)} of {len(every)} variants are measured already")
    elif kept.outdated:
        progress.line(
            "what an interrupted call measured is of another configuration, other models or other "
            "versions: measured anew"
        )
    grounds: dict[bool, Ground] = {}
    for (half, _), members in sharing.items():
        if members[0].name in kept.rows:
            continue
        if half not in grounds:
            grounds[half] = Ground(workspace, models, half=half)
        measured = _measure(grounds[half], members, sessions=1 if last else tasks)
        rows = [_row(found, complete=not last) for found in measured]
        kept.add(rows, time.perf_counter() - began)
        for found in measured:
            progress.line(_line(found))
    results = {
        "format": 1,
        "benchmark": workspace.benchmark.name,
        "seed": config.seed,
        "tasks": [task.name for task in workspace.benchmark],
        "rows": [kept.rows[variant.name] for variant in every],
        "seconds": time.perf_counter() - began,
        "configuration": config.model_dump(mode="json"),
        "versions": versions(),
        "machine": {"cpus": os.cpu_count(), "threads": torch.get_num_threads()},
    }
    if out is not None:
        write_text(Path(out) / "ablation.json", json.dumps(results, indent=1, allow_nan=False))
        write_text(Path(out) / "ablation.md", markdown(results))
        kept.remove()
    return results


def _workspace(folder: Path, progress: RunProgress) -> Workspace:
    run = RunFolder(folder)
    if not run.config_file.exists():
        raise RunFolderError(f"{folder} is not the folder of a run: there is no config.yaml in it")
    config = load_config(run.config_file)
    trainer = ContinualTrainer.from_config(config, folder)
    run.load_progress(trainer.basis())
    if not trainer.live.votes:
        raise ConfigError(
            f"{run.config_file}: model.name: condu ablate compares ways to vote, for which it takes"
            f" a CLIP model, got {trainer.live.name!r}"
        )
    accelerator = Accelerator(mixed_precision=config.mixed_precision)
    return Workspace(trainer.live, trainer.benchmark, config, folder, accelerator, progress)


def _measure(ground: Ground, members: Sequence[Variant], *, sessions: int) -> list[Measured]:
    """Variants that differ in voting alone, of which the first votes as the run did, after each of
    the last so many ``sessions``."""
    experts = ground.experts(members[0].fusing)
    first, *others = measured = [Measured(variant) for variant in members]
    tasks = len(ground.benchmark)
    for index, task in enumerate(ground.benchmark):
        experts.absorb(task.name, ground.finetuned(index))
        for found in measured if index else ():
            found.ties += experts.unified.ties
            found.moved += experts.unified.moved
        if index < tasks - sessions:
            continue
        rows = ground.scorer.fused_rows(
            experts,
            ground.prototypes(first.variant.prototypes, index + 1),
            first.variant.voting,
            protocols=PROTOCOLS,
        )
        for protocol, row in rows.items():
            first.matrices[protocol].append(list(row.accuracy))
        if others:
            answers = SessionAnswers(ground, experts)
            for found in others:
                for protocol in PROTOCOLS:
                    found.matrices[protocol].append(answers.row(found.variant, protocol))
    return measured


def _row(found: Measured, *, complete: bool) -> dict[str, Any]:
    variant = found.variant
    return {
        "group": variant.group,
        "name": variant.name,
        "settings": {
            "fusing": asdict(variant.fusing),
            "voting": asdict(variant.voting),
            "prototypes": variant.prototypes,
            "half": variant.half,
        },
        "ties": found.ties / found.moved if found.moved else None,
        "protocols": {
            protocol: {"matrix": matrix, **_summary(matrix, complete=complete)}
            for protocol, matrix in found.matrices.items()
        },
    }


def _summary(matrix: list[list[float]], *, complete: bool) -> dict[str, float | None]:
    if not complete:
        return {"transfer": None, "average": None, "last": math.fsum(matrix[-1]) / len(matrix[-1])}
    metrics = asdict(summarize(matrix))
    kept = {name: metrics[name] for name in ("transfer", "average", "last")}
    return {name: None if math.isnan(value) else value for name, value in kept.items()}


def _line(found: Measured) -> str:
    values = {
        protocol: math.fsum(matrix[-1]) / len(matrix[-1])
        for protocol, matrix in found.matrices.items()
    }
    last = ", ".join(f"{protocol} {value:.1f} %" for protocol, value in values.items())
    return f"{found.variant.group}, {found.variant.name}: Last {last}"
