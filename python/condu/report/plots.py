"""The results of a run as PNG files, in colours that colour-blind readers can tell apart."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from condu.report.tables import percent
from condu.terminal import printable

COLOURS = (
    *("#999999", "#0072B2", "#E69F00", "#009E73", "#CC79A7"),
    *("#56B4E9", "#D55E00", "#F0E442", "#000000"),
)
"""Okabe and Ito's palette and grey; hatching tells more than nine methods apart."""
HATCHES = ("", "//", "..", "xx")
METRICS = ("transfer", "average", "last")


def save_plots(results: Mapping[str, Any], folder: Path) -> list[Path]:
    """Write the accuracy matrix of each method and protocol and one chart of Transfer, Average and
    Last into `folder`, which is made if need be. Returns the files."""
    folder.mkdir(parents=True, exist_ok=True)
    files = []
    for name, method in results["methods"].items():
        for protocol, table in method["protocols"].items():
            file = folder / f"accuracy-{name}-{protocol}.png"
            _save(_accuracy_matrix(f"{name}, {protocol}", results["tasks"], table), file)
            files.append(file)
    file = folder / "summary.png"
    _save(_summary(results), file)
    return [*files, file]


def _save(figure: Figure, file: Path) -> None:
    with warnings.catch_warnings():
        # the font has no such letters; the file shows boxes, the tables the names
        warnings.filterwarnings("ignore", "Glyph .* missing from", UserWarning)
        FigureCanvasAgg(figure).print_png(file)


def _accuracy_matrix(title: str, tasks: list[str], table: Mapping[str, Any]) -> Figure:
    """Rows: after learning a task; columns: datasets. The staircase divides seen from unseen."""
    matrix = np.asarray(table["matrix"], dtype=float)
    count = len(tasks)
    figure = Figure(figsize=(2.6 + 0.72 * count, 1.9 + 0.52 * count), dpi=150, layout="constrained")
    axes = figure.add_subplot()
    image = axes.imshow(matrix, cmap="cividis", vmin=0, vmax=100, aspect="auto")
    for i in range(count):
        for j in range(count):
            colour = "white" if matrix[i, j] < 55 else "black"
            text = percent(matrix[i, j])
            axes.text(j, i, text, ha="center", va="center", color=colour, fontsize=9)
    borders = np.arange(count + 1) - 0.5
    axes.plot(np.repeat(borders[1:], 2)[:-1], np.repeat(borders[:-1], 2)[1:], color="white", lw=3)
    names = [printable(task) for task in tasks]
    plain: dict[str, Any] = {"parse_math": False}  # a name may hold dollars
    axes.set_xticks(range(count), names, rotation=35, ha="right", rotation_mode="anchor", **plain)
    axes.set_yticks(range(count), names, **plain)
    axes.set_xlim(-0.5, count - 0.5)
    axes.set_ylim(count - 0.5, -0.5)
    axes.set_xlabel("accuracy on (%)")
    axes.set_ylabel("after learning")
    summary = "   ".join(f"{metric.capitalize()} {percent(table[metric])}" for metric in METRICS)
    axes.set_title(f"{title}\n", fontweight="bold", fontsize=11)
    axes.text(0.5, 1.02, summary, transform=axes.transAxes, ha="center", va="bottom", fontsize=9)
    figure.colorbar(image, ax=axes, fraction=0.05, pad=0.02)
    return figure


def _summary(results: Mapping[str, Any]) -> Figure:
    """One panel a protocol, below each other; one group of bars a metric, one bar a method."""
    methods = results["methods"]
    protocols = list(dict.fromkeys(p for m in methods.values() for p in m["protocols"]))
    size = (1.8 + 0.38 * len(METRICS) * len(methods), 0.9 + 3 * len(protocols))
    figure = Figure(figsize=size, dpi=150, layout="constrained")
    panels = figure.subplots(len(protocols), 1, squeeze=False)[:, 0]
    for axes, protocol in zip(panels, protocols, strict=True):
        for position, (name, method) in enumerate(methods.items()):
            if protocol not in method["protocols"]:
                continue
            values = [method["protocols"][protocol][metric] for metric in METRICS]
            places = [x for x, value in enumerate(values) if value is not None]
            offset = (position - (len(methods) - 1) / 2) / (len(methods) + 1)
            bars = axes.bar(
                [x + offset for x in places],
                [values[x] for x in places],
                width=0.92 / (len(methods) + 1),
                color=COLOURS[position % len(COLOURS)],
                hatch=HATCHES[position // len(COLOURS) % len(HATCHES)],
                label=name,
            )
            axes.bar_label(bars, fmt="%.1f", fontsize=8, padding=2)
        axes.set_xticks(range(len(METRICS)), [metric.capitalize() for metric in METRICS])
        axes.set_title(protocol, fontweight="bold", fontsize=11)
        axes.set_ylim(0, 105)
        axes.set_yticks(range(0, 101, 20))
        axes.grid(axis="y", color="#dddddd")
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
        axes.set_ylabel("accuracy (%)")
    handles = {
        label: handle
        for axes in panels
        for handle, label in zip(*axes.get_legend_handles_labels(), strict=True)
    }
    figure.legend(
        handles.values(), handles.keys(), loc="outside lower center", ncols=4, frameon=False
    )
    return figure
