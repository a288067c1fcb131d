"""Where the charts put things."""

from __future__ import annotations

import pytest

from condu.report.panels import WIDTH, bar_panel, line_panel
from condu.report.spread import Spread
from condu.report.taskmarks import task_marks


def number(value: float) -> str:
    return f"{value:.1f}"


def one(value: float) -> Spread:
    return Spread(value, value, value, 1)


def test_bars_are_as_long_as_their_values() -> None:
    panel = bar_panel("t", {"a": one(50), "b": one(100), "c": None, "d": one(0)}, number)
    assert panel is not None
    assert [bar.name for bar in panel.bars] == ["a", "b", "d"]
    lengths = [bar.end - panel.start for bar in panel.bars]
    assert lengths[0] == pytest.approx(lengths[1] / 2)
    assert lengths[2] == 0
    assert panel.bars[1].end < WIDTH
    assert all(bar.whisker is None for bar in panel.bars)
    assert panel.height > max(bar.y for bar in panel.bars)


def test_the_whisker_is_the_spread_and_fits() -> None:
    panel = bar_panel("t", {"a": Spread(5, 0, 10, 3)}, number, marked=frozenset({"a"}))
    assert panel is not None
    (bar,) = panel.bars
    assert bar.whisker is not None
    assert bar.whisker[0] == panel.start
    assert bar.end == pytest.approx(sum(bar.whisker) / 2)
    assert bar.whisker[1] < WIDTH
    assert bar.marked
    assert bar.tip == "a: 5.0 (0.0–10.0)"


def test_a_given_greatest_value_is_the_scale() -> None:
    panel = bar_panel("t", {"a": one(50)}, number, greatest=100.0)
    full = bar_panel("t", {"a": one(100)}, number, greatest=100.0)
    assert panel is not None
    assert full is not None
    assert panel.bars[0].end - panel.start == pytest.approx((full.bars[0].end - full.start) / 2)
    assert [tick.text for tick in panel.ticks] == ["0", "50", "100"]
    assert [panel.ticks[n].at for n in (0, 1)] == [panel.start, panel.bars[0].end]
    assert panel.height > panel.bottom  # where the numbers stand


def test_an_axis_without_numbers_has_no_lines() -> None:
    panel = bar_panel("t", {"a": one(50)}, number)
    assert panel is not None
    assert panel.ticks == []
    assert panel.height == panel.bottom


@pytest.mark.parametrize("values", [{}, {"a": None}])
def test_nothing_measured_is_no_panel(values: dict[str, Spread | None]) -> None:
    assert bar_panel("t", values, number) is None
    assert line_panel("t", {}, number, tasks=("a",), high=1) is None


def test_bars_of_zeros_have_a_panel() -> None:
    panel = bar_panel("t", {"a": one(0)}, number)
    assert panel is not None
    assert panel.bars[0].end == panel.start


def test_a_line_is_divided_where_its_task_was_learnt() -> None:
    points = [(session, one(10.0 * session)) for session in range(3)]
    panel = line_panel("t", {"b": points, "a": points}, number, tasks=("a", "b", "c"), high=20)
    assert panel is not None
    line_b, line_a = panel.lines
    assert [line.mark for line in panel.lines] == [task_marks(("a", "b"))[n] for n in (1, 0)]
    assert (len(line_a.before), len(line_a.since)) == (1, 3)
    assert (len(line_b.before), len(line_b.since)) == (2, 2)
    assert line_b.before[-1] == line_b.since[0]  # no gap between the two
    assert line_a.since[0].tip == "a, after 1 task: 0.0"
    assert line_a.since[1].tip == "a, after 2 tasks: 10.0"
    bottom, middle, top = (dot.y for dot in line_a.since)
    assert (bottom, top) == (panel.bottom, panel.top)
    assert middle == pytest.approx((bottom + top) / 2)
    assert [tick.text for tick in panel.x_ticks] == ["1", "2", "3"]


def test_the_axis_reaches_beyond_what_was_measured() -> None:
    panel = line_panel("t", {"a": [(0, one(1.16))]}, number, tasks=("a",), high=1)
    assert panel is not None
    (dot,) = panel.lines[0].since
    assert panel.top < dot.y < panel.bottom
    assert [tick.text for tick in panel.y_ticks] == ["0", "0.25", "0.5", "0.75", "1", "1.25"]
    assert [tick.text for tick in panel.x_ticks] == ["1"]
    below = line_panel("t", {"a": [(0, one(-0.35))]}, number, tasks=("a",), high=1)
    assert below is not None
    assert below.lines[0].since[0].y < below.bottom
