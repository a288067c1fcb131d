"""What `condu theory` found, as SVG files in colours that colour-blind readers can tell apart."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, Locator, LogLocator, MaxNLocator, NullLocator

from condu.theory.repetition import RESOLUTION

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
MARKERS = ("o", "s", "^", "D", "v", "P")
SHARES = {
    "mask_flips": "mask bits of old tasks that flip",
    "sign_flips": "elements whose elected sign flips",
    "winner_changes": "elements whose winning delta changes",
    "won_by_new": "elements that the new task wins",
}


def save_plots(record: Mapping[str, Any], folder: Path) -> list[Path]:
    """Write `repetition.svg` (Theorem F.3), `flips.svg` (Theorem F.5) and `change.svg` (Corollary
    F.6) into `folder`. Returns the files."""
    figures = {
        "repetition.svg": _repetition(record["deltas"]),
        "flips.svg": _flips(record["deltas"]),
        "change.svg": _change(record["deltas"]),
    }
    for name, figure in figures.items():
        FigureCanvasSVG(figure).print_svg(folder / name, metadata={"Date": None})
    return [folder / name for name in figures]


def _repetition(deltas: Mapping[str, Any]) -> Figure:
    figure, panels = _panels(deltas)
    for axes, (name, found) in zip(panels, deltas.items(), strict=True):
        for place, row in enumerate(found["repetition"]):
            iterations, changes = np.array(row["changes"]).T
            changes[changes == 0] = np.nan  # nothing to see on a logarithmic axis
            label = f"{row['tasks']} tasks"
            _line(axes, iterations, changes, place, label)
        axes.axhline(RESOLUTION, color="#666666", lw=1, ls="--", label="resolution of float32")
        _finish(axes, f"{name} deltas", "iteration of decoupling and unifying")
        axes.set_xscale("log")
    panels[0].set_ylabel("L1 change of the deltas, relative")
    panels[0].legend(frameon=False, fontsize=9)
    return figure


def _flips(deltas: Mapping[str, Any]) -> Figure:
    figure, panels = _panels(deltas)
    for axes, (name, found) in zip(panels, deltas.items(), strict=True):
        tasks = [row["tasks"] for row in found["joining"]]
        for place, (key, label) in enumerate(SHARES.items()):
            shares = np.array([100 * row[key] for row in found["joining"]])
            shares[shares == 0] = np.nan
            _line(axes, tasks, shares, place, label)
        _finish(axes, f"{name} deltas", "n, the task that joins")
        axes.xaxis.set_major_locator(FixedLocator(task_ticks(tasks, MaxNLocator(integer=True))))
    panels[0].set_ylabel("share (%)")
    panels[0].legend(frameon=False, fontsize=9)
    return figure


def _change(deltas: Mapping[str, Any]) -> Figure:
    """Both kinds of deltas against n, both axes logarithmic, beside 1/n."""
    figure = Figure(figsize=(6, 4.2), layout="constrained")
    axes = figure.add_subplot()
    for place, (name, found) in enumerate(deltas.items()):
        tasks = [row["tasks"] for row in found["joining"]]
        changes = np.array([100 * row["delta_change"] for row in found["joining"]])
        changes[changes == 0] = np.nan
        power = found["decay"]
        fit = "" if power is None else f": as n^{power:.2f} in the second half"
        _line(axes, tasks, changes, place, f"{name} deltas{fit}")
    axes.plot(tasks, [100 / n for n in tasks], color="#666666", lw=1, ls="--", label="1/n")
    _finish(axes, "Corollary F.6", "n, the task that joins")
    axes.set_xscale("log")
    by_decade = LogLocator(subs=(1, 2, 5))
    axes.xaxis.set_major_locator(FixedLocator(task_ticks(tasks, by_decade, scale=np.log)))
    axes.yaxis.set_major_locator(by_decade)
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter("{x:g}")
        axis.set_minor_locator(NullLocator())
    axes.set_ylabel("mean L1 change of the old deltas (%)")
    axes.legend(frameon=False, fontsize=9)
    return figure


def task_ticks(
    tasks: Sequence[int], locator: Locator, scale: Callable[[float], float] = float
) -> list[int]:
    """Where `locator` puts ticks at numbers of tasks, and always at the last one: whole numbers.
    Those that `scale`, the axis's, brings too close to the last to be read are left out."""
    first, last = tasks[0], tasks[-1]
    near = 0.08 * (scale(last) - scale(first))
    at = {round(tick) for tick in locator.tick_values(first, last)}
    return [*sorted(n for n in at if first <= n < last and scale(last) - scale(n) > near), last]


def _panels(deltas: Mapping[str, Any]) -> tuple[Figure, Sequence[Axes]]:
    figure = Figure(figsize=(5.2 * len(deltas), 4.2), layout="constrained")
    return figure, figure.subplots(1, len(deltas), sharey=True, squeeze=False)[0]


def _line(axes: Axes, x: Sequence[int], y: np.ndarray, place: int, label: str) -> None:
    """With markers at even distances along it, and at its end, which these may miss."""
    style: dict[str, Any] = {
        "color": COLOURS[place % len(COLOURS)],
        "marker": MARKERS[place % len(MARKERS)],
        "ms": 4,
        "lw": 1.4,
    }
    axes.plot(x, y, **style, markevery=0.12, label=label)  # of the axes' diagonal
    drawn = np.flatnonzero(np.isfinite(y))
    if drawn.size:
        axes.plot(x[drawn[-1]], y[drawn[-1]], **style)


def _finish(axes: Axes, title: str, x: str) -> None:
    axes.set_yscale("log")
    axes.set_title(title, fontweight="bold", fontsize=11)
    axes.set_xlabel(x)
    axes.grid(axis="y", color="#dddddd")
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
