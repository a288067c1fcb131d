"""An inspection as tables for the terminal. Numbers are rounded here and nowhere else."""

from __future__ import annotations

from collections.abc import Iterator

from rich.filesize import decimal
from rich.table import Table
from rich.text import Text

from condu.checkpoint.inspecting import Inspection, TaskInspection
from condu.report.tables import NARROW, UNDEFINED, percent
from condu.terminal import printable

_WIDEST = 8  # tasks that still fit beside each other
_PAIRS = 5  # of the tasks that agree most, and least


def tables(inspection: Inspection) -> Iterator[Table | Text]:
    """What `condu inspect` prints."""
    yield Text("\n".join(_summary(inspection)))
    if inspection.tasks:
        yield _tasks(inspection)
        yield _groups(inspection)
    if len(inspection.tasks) > _WIDEST:
        yield _pairs(inspection)
    elif len(inspection.tasks) > 1:
        yield _matrix(inspection)


def _summary(found: Inspection) -> Iterator[str]:
    yield printable(found.path)
    yield f"base model   {printable(found.base_name or UNDEFINED)}"
    yield f"rule         zero sums {found.rule.zero_sum}, rescale {found.rule.rescale}"
    yield (
        f"format       version {found.format_version}, written by condu {found.library_version},"
        f" generation {found.generation}"
    )
    yield (
        f"fused        {found.parameters:,} parameters in {found.tensors:,} tensors, {found.dtype}"
    )
    sizes, each = found.sizes, found.bytes_per_parameter
    yield f"size         {decimal(sizes.total)}" + (
        "" if each is None else f", {each:.3f} bytes a parameter"
    )
    yield (
        f"             unified delta {decimal(sizes.unified)}, triggers "
        f"{decimal(sizes.triggers)}, private {decimal(sizes.private)}"
    )
    if found.zero_sums is None:
        yield "exact ties   not counted"
    else:
        share = found.zero_sums / found.parameters if found.parameters else None
        count = f"{found.zero_sums:,} ({_percent(share)} % of the parameters)"
        yield f"exact ties   {count} in the last fusion"


def _tasks(found: Inspection) -> Table:
    table = Table(**NARROW)
    for column in ("", "λ", "mask %", "private"):
        table.add_column(column, justify="right")
    table.add_column("task", overflow="ellipsis", no_wrap=True)
    for number, task in enumerate(found.tasks, 1):
        private = UNDEFINED
        if task.private_tensors:
            private = f"{task.private_tensors} ({decimal(task.private_bytes)})"
        name = Text(printable(task.name))
        table.add_row(str(number), _rescaler(task), _percent(task.density), private, name)
    return table


def _groups(found: Inspection) -> Table:
    """Density by layer group: of each task, or of many the lowest, the mean and the highest."""
    many = len(found.tasks) > _WIDEST
    counted = found.zero_sums is not None
    numbers = [str(number) for number in range(1, len(found.tasks) + 1)]
    title = "mask % by layer group: lowest, mean, highest task" if many else "mask % by layer group"
    table = Table(title=title, **NARROW)
    table.add_column("group", overflow="fold")
    for column in (
        "parameters",
        *(["ties %"] if counted else []),
        *(["min", "mean", "max"] if many else numbers),
    ):
        table.add_column(column, justify="right", no_wrap=True)
    for k, group in enumerate(found.groups):
        densities = [task.group_density[k] for task in found.tasks]
        if many:
            known = [density for density in densities if density is not None]
            mean = sum(known) / len(known) if known else None
            densities = [min(known, default=None), mean, max(known, default=None)]
        ties = []
        if group.zero_sums is not None:
            share = group.zero_sums / group.parameters if group.parameters else None
            ties = [_percent(share)]
        cells = [f"{group.parameters:,}", *ties, *map(_percent, densities)]
        table.add_row(Text(printable(group.name)), *cells)
    return table


def _matrix(found: Inspection) -> Table:
    table = Table(title="agreement %", **NARROW)
    for column in ("", *map(str, range(1, len(found.tasks) + 1))):
        table.add_column(column, justify="right")
    for number, row in enumerate(found.agreement, 1):
        cells = [UNDEFINED if k == number else _percent(v) for k, v in enumerate(row, 1)]
        table.add_row(str(number), *cells)
    return table


def _pairs(found: Inspection) -> Table:
    """The pairs of tasks that agree most and least."""
    pairs = [
        (agreement, i, k)
        for k, row in enumerate(found.agreement)
        for i, agreement in enumerate(row[:k])
        if agreement is not None
    ]
    pairs.sort(key=lambda pair: -pair[0])
    table = Table(title="highest and lowest agreement (all pairs: --json)", **NARROW)
    table.add_column("%", justify="right")
    for column in ("task", "and task"):
        table.add_column(column, overflow="ellipsis", no_wrap=True)
    for chosen in (pairs[:_PAIRS], pairs[_PAIRS:][-_PAIRS:]):
        for agreement, i, k in chosen:
            names = (f"{n + 1} {printable(found.tasks[n].name)}" for n in (i, k))
            table.add_row(_percent(agreement), *map(Text, names))
        table.add_section()
    return table


def _rescaler(task: TaskInspection) -> str:
    low, high = task.rescaler
    return f"{low:.4f}" if low == high else f"{low:.4f}–{high:.4f}"


def _percent(share: float | None) -> str:
    return percent(None if share is None else 100 * share)
