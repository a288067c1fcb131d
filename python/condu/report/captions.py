"""What the page says in words about the runs that it shows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import yaml

from condu.report.experiment import Experiment
from condu.terminal import printable

PROTOCOLS = {
    "task-id": "The data set is given. A task that was learnt is answered by its own expert, one "
    "that was not by what the method has for unknown data.",
    "agnostic": "Which expert to ask is not given; the class names of the data set are.",
    "union-odcl-cil": "Of a data set that was learnt, neither it nor its class names are given: "
    "the answer is one of all classes learnt so far. One that was not, so all of Transfer, is "
    "answered among its own classes.",
    "union-x-tail": "Neither the data set nor its class names are given: the answer is one of "
    "all classes of the benchmark, seen or not.",
}


def lead(tasks: Sequence[str]) -> str:
    if len(tasks) == 1:
        return f"Every method learns {tasks[0]} and is tested on it."
    *before, last = tasks
    return (
        f"Every method learns {', then '.join(before)}, then {last}, and is tested on all of them "
        "after each."
    )


def at_a_glance(experiments: Sequence[Experiment]) -> dict[str, str]:
    models = dict.fromkeys(experiment.model for experiment in experiments)
    methods = dict.fromkeys(m for experiment in experiments for m in experiment.methods)
    seeds = sorted({seed for experiment in experiments for seed in experiment.seeds})
    runs = sum(len(experiment.runs) for experiment in experiments)
    counts = {"configurations": len(experiments)} if len(experiments) > 1 else {}
    return {
        "model": ", ".join(models),
        "methods": str(len(methods)),
        **{name: str(count) for name, count in counts.items()},
        "runs": str(runs),
        "seeds": ", ".join(map(str, seeds)),
    }


def varying(settings: Mapping[str, Sequence[Any]]) -> dict[str, list[str]]:
    """Values of a configuration as words."""
    return {
        key: [", ".join(map(str, v)) if isinstance(v, list) else str(v) for v in values]
        for key, values in settings.items()
    }


def published_note(experiments: Sequence[Experiment]) -> str:
    """With which choices the authors' numbers presumably came about, and those of these runs."""
    settings = [experiment.first["configuration"] for experiment in experiments]
    chosen = dict.fromkeys((_voting(s["voting"]), s["fusion"]["rescale"]) for s in settings)
    here = "; ".join(f"voting {voting}, rescale {rescale}" for voting, rescale in chosen)
    return (
        "The rows of ConDU presumably come from the authors' code (voting code, rescale "
        f"tensor_mean); the runs here have {here}."
    )


def _voting(section: Mapping[str, Any]) -> str:
    """The preset, and what was changed of it."""
    changes = [f"{k} {v}" for k, v in section.items() if k != "preset" and v is not None]
    return section["preset"] + (f" with {', '.join(changes)}" if changes else "")


def configuration(experiment: Experiment) -> str:
    """The configuration of the first seed as YAML."""
    text = yaml.safe_dump(
        experiment.first["configuration"], sort_keys=False, allow_unicode=True, width=88
    )
    return "\n".join(printable(line) for line in text.splitlines())
