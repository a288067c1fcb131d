"""A state of a hundred tasks: time, size and memory of absorb as functions of the number of tasks.

    python benchmarks/many_tasks.py --out benchmarks/results/DATE-many-tasks [--scratch FOLDER]

Absorbs one fine-tune of ViT-B/16 after another (149.6 M parameters, float32, random values) with
``condu_ext.absorb_`` as it is called by default, and times every call beside a copy of memory; all
of it three times, of which medians are plotted. With ``--scratch`` (8 GB, removed in the end) also
``condu absorb`` from disk to disk, at a few numbers of tasks, as whole commands with a warm page
cache. Leaves ``many-tasks.json`` and ``many-tasks.png``.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import asdict
from datetime import date
from functools import partial
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from safetensors.torch import save_file

import condu_ext as cx
from condu.bench.cases import PRECISIONS
from condu.bench.ceiling import Copy
from condu.bench.inputs import Inputs, task_name
from condu.bench.measure import timed
from condu.bench.memory import peak_memory
from condu.bench.record import Record, commit, machine
from condu.bench.shapes import MODELS, parameters
from condu.bench.table import machine_line
from timed_command import run

CPU = torch.device("cpu")
ON_DISK = (1, 4, 16, 50, 99)
ROUNDS = 3
MEMORY, DISK, STREAM = "#0072B2", "#D55E00", "#E69F00"


def measure(model: str, tasks: int, scratch: Path | None, save: Callable[[Record], None]) -> None:
    """Grow a state task by task, several times; ``save`` is called with the record whenever there
    is more in it."""
    inputs, copy = Inputs(MODELS[model](), PRECISIONS["fp32"], CPU), Copy(CPU)
    copy()
    record: Record = {
        "date": date.today().isoformat(),
        "commit": commit(),
        "machine": machine(CPU),
        "model": model,
        "parameters": parameters(inputs.shapes),
        "in_memory": [{"old_tasks": T, "rounds": []} for T in range(tasks)],
        "on_disk": [],
    }
    if scratch:
        save_file(inputs.pretrained, scratch / "base.safetensors")
    for sequence in range(ROUNDS):
        state = cx.UnifiedDelta.empty(inputs.pretrained)
        for T, row in enumerate(record["in_memory"]):
            new = inputs.newcomer(T)
            if scratch and not sequence and T in ON_DISK:
                save_file(new, scratch / "new.safetensors")
                state.save(scratch / "state")
                record["on_disk"].append(from_disk_to_disk(scratch, T))
                shutil.rmtree(scratch / "state")
            copying, _ = timed(copy, CPU)
            with peak_memory(CPU) as peak:
                seconds, _ = timed(
                    partial(cx.absorb_, state, task_name(T), new, inputs.pretrained), CPU
                )
            beside = {"copy_bytes_per_second": copy.moved / copying, "load": os.getloadavg()[0]}
            row["rounds"].append({"seconds": seconds} | beside)
            row["seconds"] = median(r["seconds"] for r in row["rounds"])
            row |= {"state_bytes": state.nbytes, "extra_peak_bytes": peak.extra}
            save(record)


def from_disk_to_disk(scratch: Path, old_tasks: int) -> dict[str, Any]:
    """``condu absorb`` on a state of ``old_tasks`` tasks: the round of median time."""
    target = scratch / "target"
    given = ["--base", str(scratch / "base.safetensors")]
    given += ["--task", f"new={scratch / 'new.safetensors'}", "--out", str(target)]
    rounds = []
    for _ in range(ROUNDS + 1):  # the first warms the page cache
        shutil.rmtree(target, ignore_errors=True)
        rounds.append(run("absorb", str(scratch / "state"), *given))
    chosen = sorted(rounds[1:], key=lambda r: r.apart_from_fsync)[ROUNDS // 2]
    size = sum(file.stat().st_size for file in target.iterdir() if file.is_file())
    shutil.rmtree(target)
    return {
        "old_tasks": old_tasks,
        **asdict(chosen),
        "apart_from_fsync": chosen.apart_from_fsync,
        "streaming": chosen.summary["elapsed"],
        "state_bytes": size,
    }


def figure_of(record: Record) -> Figure:
    """Time, size and peak memory over the number of tasks."""
    figure = Figure(figsize=(13, 4.2), dpi=150, layout="constrained")
    time_axes, size_axes, peak_axes = figure.subplots(1, 3)
    memory, disk = record["in_memory"], record["on_disk"]
    _points(time_axes, memory, "seconds", 1, MEMORY, "absorb_ in memory")
    _points(time_axes, disk, "apart_from_fsync", 1, DISK, "condu absorb, fsync apart")
    _points(time_axes, disk, "streaming", 1, STREAM, "of that reading, fusing, writing")
    _finish(time_axes, "Time of one absorb", "seconds")
    _points(size_axes, memory, "state_bytes", 1e9, MEMORY, "in memory")
    _points(size_axes, disk, "state_bytes", 1e9, DISK, "on disk")
    bits = [record["parameters"] * (4 + (row["old_tasks"] + 1) / 8) / 1e9 for row in memory]
    places = [row["old_tasks"] for row in memory]
    size_axes.plot(places, bits, color="#999999", lw=1, label="4 + T/8 bytes a parameter")
    _finish(size_axes, "Size of the new state", "GB")
    _points(peak_axes, memory, "extra_peak_bytes", 1e9, MEMORY, "absorb_, beyond state and models")
    _points(peak_axes, disk, "peak_bytes", 1e9, DISK, "condu absorb, whole process")
    _finish(peak_axes, "Peak memory", "GB")
    figure.suptitle(f"{record['model']}, float32. {machine_line(record)}", fontsize=9)
    return figure


def _points(
    axes: Axes, rows: Sequence[Record], key: str, unit: float, colour: str, label: str
) -> None:
    found = [(row["old_tasks"], row[key] / unit) for row in rows if row[key] is not None]
    if found:
        axes.plot(*zip(*found, strict=True), color=colour, marker="o", ms=3, ls="", label=label)


def _finish(axes: Axes, title: str, y: str) -> None:
    axes.set_title(title, fontweight="bold", fontsize=11)
    axes.set_xlabel("old tasks")
    axes.set_ylabel(y)
    axes.set_ylim(0, 1.35 * axes.get_ylim()[1])  # room for the legend
    axes.grid(axis="y", color="#dddddd")
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(loc="upper left", frameon=False, fontsize=8)


def with_slopes(record: Record) -> Record:
    """Adds straight lines through the points in memory: what one more task costs."""
    rows = [row for row in record["in_memory"] if row["rounds"]]
    if len(rows) > 1:
        T = np.array([row["old_tasks"] for row in rows])
        size = np.polyfit(T, [row["state_bytes"] for row in rows], 1)[0]
        record["bytes_a_task_and_parameter"] = float(size) / record["parameters"]
        seconds = np.polyfit(T, [row["seconds"] for row in rows], 1)
        record["seconds_at_0_and_a_task"] = [float(seconds[1]), float(seconds[0])]
    return record


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, required=True, help="folder for record and picture")
    parser.add_argument("--scratch", type=Path, help="folder with room for 8 GB of files")
    parser.add_argument("--model", default="ViT-B-16", choices=list(MODELS))
    parser.add_argument("--tasks", type=int, default=100)
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)

    def save(record: Record) -> None:
        text = json.dumps(with_slopes(record), indent=1) + "\n"
        (options.out / "many-tasks.json").write_text(text)

    with ExitStack() as stack:
        scratch = None
        if options.scratch:
            scratch = Path(stack.enter_context(TemporaryDirectory(dir=options.scratch)))
        measure(options.model, options.tasks, scratch, save)
    record = json.loads((options.out / "many-tasks.json").read_text())
    FigureCanvasAgg(figure_of(record)).print_png(options.out / "many-tasks.png")


if __name__ == "__main__":
    main()
