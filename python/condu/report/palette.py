"""Colours of the page, light and dark.

Ramps go from the paper's lightness to its opposite, so they survive colour blindness and a grey
printer; the hues of the tasks are far apart in lightness or in blue against yellow.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from matplotlib.colors import LinearSegmentedColormap, to_hex, to_rgb

from condu.report.heatmaps import LEVELS

INKS = ("#000000", "#ffffff")


@dataclass(frozen=True)
class Theme:
    """Custom properties of the style sheet by name."""

    scheme: str
    surface: dict[str, str]
    heat: list[str]
    hues: tuple[str, ...]

    @property
    def properties(self) -> dict[str, str]:
        return {
            **self.surface,
            **{f"heat-{level}": colour for level, colour in enumerate(self.heat)},
            **{f"ink-{level}": ink_on(colour) for level, colour in enumerate(self.heat)},
            **{f"hue-{position}": colour for position, colour in enumerate(self.hues)},
        }


def ramp(stops: Sequence[str], count: int) -> list[str]:
    """`count` colours through the stops."""
    colours = LinearSegmentedColormap.from_list("ramp", list(stops))
    return [to_hex(colours(position / (count - 1))) for position in range(count)]


def contrast(one: str, other: str) -> float:
    """WCAG's ratio of two colours, from 1 to 21."""
    lighter, darker = sorted((_luminance(one), _luminance(other)), reverse=True)
    return (lighter + 0.05) / (darker + 0.05)


def ink_on(colour: str) -> str:
    """Black or white, whichever is easier to read on a colour."""
    return max(INKS, key=lambda ink: contrast(ink, colour))


def _luminance(colour: str) -> float:
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in to_rgb(colour)]
    red, green, blue = linear
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


LIGHT = Theme(
    scheme="light",
    surface={
        "paper": "#fbfaf7",
        "card": "#ffffff",
        "ink": "#1a2026",
        "muted": "#566069",
        "rule": "#e2dfd8",
        "accent": "#0f5f8f",
        "plain": "#a9b1b7",
        "whisker": "#1a2026",
    },
    heat=ramp(("#f4f6f6", "#9cc3d8", "#3d85ae", "#0b3f63"), LEVELS),
    hues=("#0072b2", "#c65a00", "#007d5a", "#a84a83", "#8a6d00", "#1f97ce", "#333f48"),
)

DARK = Theme(
    scheme="dark",
    surface={
        "paper": "#12161a",
        "card": "#191f24",
        "ink": "#e8eaec",
        "muted": "#a2acb4",
        "rule": "#2d353b",
        "accent": "#5fb2e0",
        "plain": "#66717a",
        "whisker": "#e8eaec",
    },
    heat=ramp(("#1d242a", "#1f5676", "#4a97c0", "#c9e8f8"), LEVELS),
    hues=("#4aa3df", "#f08a3c", "#2fbf93", "#e08fc0", "#e3c44c", "#9ad9f7", "#c3ccd3"),
)
