"""Where things stand in the small charts of a page, in the units of an SVG that is 340 wide.

A panel is that narrow so that a phone shows it at its own size, and a wide screen several in a row.
What is drawn there, and in which colours, is up to the templates.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from matplotlib.ticker import MaxNLocator

from condu.report.spread import Spread
from condu.report.taskmarks import TaskMark, task_marks

WIDTH = 340.0

Number = Callable[[float], str]
Points = Sequence[tuple[int, Spread]]


@dataclass(frozen=True)
class Tick:
    at: float
    text: str


@dataclass(frozen=True)
class Axis:
    """Values from `low` to `high` between two places of the panel."""

    low: float
    high: float
    start: float
    end: float

    def __call__(self, value: float) -> float:
        return self.start + (value - self.low) / (self.high - self.low) * (self.end - self.start)


@dataclass(frozen=True)
class Bar:
    """One method's bar, at height `y`; the whisker is None where there is one measurement."""

    name: str
    text: str
    tip: str
    y: float
    end: float
    whisker: tuple[float, float] | None
    marked: bool


@dataclass(frozen=True)
class BarPanel:
    """`ticks` are labelled lines below `bottom`; none where the numbers beside the bars suffice."""

    title: str
    bars: list[Bar]
    ticks: list[Tick]
    start: float
    bottom: float
    height: float


@dataclass(frozen=True)
class Dot:
    x: float
    y: float
    tip: str


@dataclass(frozen=True)
class Line:
    """One task over the sessions: `before` it was learnt and `since`, which share a point."""

    mark: TaskMark
    before: list[Dot]
    since: list[Dot]


@dataclass(frozen=True)
class LinePanel:
    title: str
    lines: list[Line]
    x_ticks: list[Tick]
    y_ticks: list[Tick]
    left: float = 40.0
    right: float = WIDTH - 10
    top: float = 12.0
    bottom: float = 176.0
    height: float = 212.0


def bar_panel(
    title: str,
    values: Mapping[str, Spread | None],
    number: Number,
    *,
    greatest: float | None = None,
    marked: frozenset[str] = frozenset(),
) -> BarPanel | None:
    """Horizontal bars, one for each name that has a value: from 0 to `greatest`, with ticks, or to
    the greatest measurement. None if there is no value."""
    measured = {name: spread for name, spread in values.items() if spread is not None}
    if not measured:
        return None
    start, row, top = 124.0, 19.0, 6.0
    high = greatest or max(spread.greatest for spread in measured.values()) or 1.0
    axis = Axis(0.0, high, start, WIDTH - 60)
    bars = [
        Bar(
            name=name,
            text=number(spread.mean),
            tip=f"{name}: {spread.text(number)}",
            y=top + row * position,
            end=axis(spread.mean),
            whisker=(axis(spread.least), axis(spread.greatest)) if spread.varies else None,
            marked=name in marked,
        )
        for position, (name, spread) in enumerate(measured.items())
    ]
    ticks = _ticks(axis, (0, greatest / 2, greatest)) if greatest else []
    bottom = top + row * len(bars) + 4
    return BarPanel(title, bars, ticks, start, bottom, bottom + 14 * bool(ticks))


def line_panel(
    title: str,
    series: Mapping[str, Points],
    number: Number,
    *,
    tasks: Sequence[str],
    high: float,
) -> LinePanel | None:
    """One line for each task in `series`, whose sessions are counted from 0; it is dashed before
    the session that learnt the task. The axis goes from 0 to `high`, or as far as the points
    do. None if there is no point."""
    means = [spread.mean for points in series.values() for _, spread in points]
    if not means:
        return None
    frame = LinePanel(title, [], [], [])
    sessions = max(len(tasks), 2)
    x = Axis(1, sessions, frame.left + 8, frame.right - 8)
    heights = _round_values(min(0, *means), max(high, *means))
    y = Axis(heights[0], heights[-1], frame.bottom, frame.top)
    marks = task_marks(tasks)
    lines = []
    for name, points in series.items():
        learnt = tasks.index(name)
        dots = {
            session: Dot(
                x(session + 1),
                y(spread.mean),
                f"{name}, after {_sessions(session + 1)}: {spread.text(number)}",
            )
            for session, spread in points
        }
        lines.append(
            Line(
                marks[learnt],
                [dot for session, dot in dots.items() if session <= learnt],
                [dot for session, dot in dots.items() if session >= learnt],
            )
        )
    whole = [n for n in _round_values(1, sessions, integer=True) if 1 <= n <= len(tasks)]
    return LinePanel(title, lines, _ticks(x, whole), _ticks(y, heights))


def _round_values(low: float, high: float, *, integer: bool = False) -> list[float]:
    """Round numbers at even distances from `low` or below to `high` or above."""
    locator = MaxNLocator(8 if integer else 5, integer=integer)
    return [float(value) for value in locator.tick_values(low, high)]


def _ticks(axis: Axis, values: Sequence[float]) -> list[Tick]:
    return [Tick(axis(value), f"{value:.10g}") for value in values]


def _sessions(count: int) -> str:
    return f"{count} task{'s' * (count > 1)}"
