"""A record as a picture: how close to the copy at which size, and how time grows with tasks."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import FuncFormatter, NullLocator

from condu.bench.cases import OPERATIONS
from condu.bench.record import Record
from condu.bench.table import machine_line

COLOURS = dict(
    zip(
        OPERATIONS,
        ("#0072B2", "#D55E00", "#E69F00", "#009E73", "#CC79A7", "#56B4E9"),
        strict=True,
    )
)
"""Okabe and Ito's palette, which colour-blind readers can tell apart."""
STYLES = {"fp32": "-", "bf16": "--", "bf16/bf16": ":", "fp16": "-."}


def save_plot(record: Record, file: Path) -> None:
    """Write both panels as a PNG."""
    FigureCanvasAgg(figure_of(record)).print_png(file)


def figure_of(record: Record) -> Figure:
    """Both panels: rates on the left, times on the right."""
    cases = [case for case in record["cases"] if case["seconds"]]
    figure = Figure(figsize=(11, 5.2), dpi=150, layout="constrained")
    rates, times = figure.subplots(1, 2)
    _rates(rates, cases)
    _times(times, cases)
    operations = [name for name in COLOURS if any(c["operation"] == name for c in cases)]
    precisions = [name for name in STYLES if any(c["dtype"] == name for c in cases)]
    handles = [Line2D([], [], color=COLOURS[o], marker="o", label=o) for o in operations]
    handles += [Line2D([], [], color="#555555", ls=STYLES[p], label=p) for p in precisions]
    figure.legend(handles=handles, loc="outside lower center", ncols=6, frameon=False)
    figure.suptitle(machine_line(record), fontsize=9)
    return figure


def _rates(axes: Axes, cases: list[Record]) -> None:
    """Share of the copy's rate over the number of parameters, at the number of tasks that most
    models were measured with."""
    tasks = max(
        {case["tasks"] for case in cases},
        key=lambda t: (len({c["model"] for c in cases if c["tasks"] == t}), t == 8, t),
        default=0,
    )
    chosen = [case for case in cases if case["tasks"] == tasks]
    sizes = {case["parameters"]: case["model"] for case in chosen}
    if len(sizes) < 2:
        _bars(axes, chosen)
    else:
        _lines(axes, chosen, x="parameters", y=lambda case: 100 * case["ratio"])
        axes.set_xscale("log")
        axes.set_xticks(list(sizes), [f"{name}\n{_count(size)}" for size, name in sizes.items()])
        axes.xaxis.set_minor_locator(NullLocator())
    axes.axhline(100, color="#999999", lw=1)
    axes.set_ylim(0, max([105, *(105 * case["ratio"] for case in chosen)]))
    names = ", ".join(sizes.values()) if len(sizes) < 2 else "all models"
    _finish(axes, f"Rate, {names}, {tasks} tasks", "", "bytes moved per second (% of a copy)")


def _bars(axes: Axes, cases: list[Record]) -> None:
    """One model: its operations side by side, one bar for each precision."""
    operations = [name for name in COLOURS if any(c["operation"] == name for c in cases)]
    precisions = [name for name in STYLES if any(c["dtype"] == name for c in cases)]
    width = 0.8 / max(1, len(precisions))
    for case in cases:
        offset = (precisions.index(case["dtype"]) - (len(precisions) - 1) / 2) * width
        place = operations.index(case["operation"]) + offset
        bar = axes.bar(place, 100 * case["ratio"], 0.9 * width, color=COLOURS[case["operation"]])
        axes.bar_label(bar, fmt="%.0f", fontsize=8, padding=2)
        bar.patches[0].set(ec="black", ls=STYLES[case["dtype"]])
    axes.set_xticks(range(len(operations)), _two_lines(operations), fontsize=9)


def _times(axes: Axes, cases: list[Record]) -> None:
    """Median time over the number of tasks, for the model and the first precision with most of
    them; for a single number of tasks beside the baselines."""
    model = max(
        {case["model"] for case in cases},
        key=lambda m: (
            len({c["tasks"] for c in cases if c["model"] == m}),
            max(c["parameters"] for c in cases if c["model"] == m),
        ),
        default="",
    )
    chosen = [case for case in cases if case["model"] == model]
    precision = next((p for p in STYLES if any(c["dtype"] == p for c in chosen)), "")
    chosen = [case for case in chosen if case["dtype"] == precision]
    tasks = sorted({case["tasks"] for case in chosen})
    title = f"Time, {model}, {precision}"
    axes.set_yscale("log")
    if len(tasks) == 1:
        _beside_baselines(axes, chosen)
        title += f", {tasks[0]} tasks"
    else:
        _lines(axes, chosen, x="tasks", y=lambda case: 1e3 * case["seconds"]["median"])
        axes.set_xticks(tasks, [str(t) for t in tasks])
        axes.yaxis.set_minor_formatter(FuncFormatter(_half_decades))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,g}"))
    _finish(axes, title, "" if len(tasks) == 1 else "tasks", "median time (ms)")


def _beside_baselines(axes: Axes, cases: list[Record]) -> None:
    """A group of bars for each operation: the kernel in colour, the baselines that ran in grey."""
    greys = ("#d9d9d9", "#a6a6a6", "#666666")
    names = list(dict.fromkeys(name for case in cases for name in case["baselines"]))
    width = 0.8 / (1 + len(names))
    for place, case in enumerate(cases):
        left = place - 0.4 + width / 2
        axes.bar(left, 1e3 * case["seconds"]["median"], width, color=COLOURS[case["operation"]])
        for k, name in enumerate(names, 1):
            if seconds := case["baselines"].get(name, {}).get("seconds"):
                axes.bar(left + k * width, 1e3 * seconds["median"], width, color=greys[-k % 3])
    axes.set_xticks(range(len(cases)), _two_lines(case["operation"] for case in cases), fontsize=9)
    handles = [Patch(color=greys[-k % 3], label=name) for k, name in enumerate(names, 1)]
    if handles:
        low, high = axes.get_ylim()
        axes.set_ylim(low, 4 * high)
        axes.legend(
            handles=handles, loc="upper center", ncols=3, frameon=False, title="PyTorch alone"
        )


def _two_lines(operations: Iterable[str]) -> list[str]:
    return [name.replace("+", "\n+") for name in operations]


def _half_decades(value: float, _: int) -> str:
    """Labels at 2 and 5 only, so that an axis of less than a decade has some and no more."""
    return f"{value:g}" if f"{value:e}"[0] in "25" else ""


def _lines(axes: Axes, cases: list[Record], *, x: str, y: Callable[[Record], float]) -> None:
    for operation, colour in COLOURS.items():
        for precision, style in STYLES.items():
            points = sorted(
                (case[x], y(case))
                for case in cases
                if (case["operation"], case["dtype"]) == (operation, precision)
            )
            if points:
                axes.plot(*zip(*points, strict=True), color=colour, ls=style, marker="o", ms=5)


def _finish(axes: Axes, title: str, x: str, y: str) -> None:
    axes.set_title(title, fontweight="bold", fontsize=11)
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    axes.grid(axis="y", color="#dddddd")
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)


def _count(parameters: int) -> str:
    return f"{parameters / 1e9:.2g} B" if parameters >= 1e9 else f"{parameters / 1e6:.3g} M"
