"""From values to markup that is safe whatever the values hold."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Sequence
from typing import Any

import jinja2
from markupsafe import Markup

from condu.report.panels import Dot
from condu.report.tables import percent
from condu.terminal import printable


def environment() -> jinja2.Environment:
    """Templates of this package with everything escaped, and with the filters `percent`, `range`
    (of a spread in percent), `place` (a coordinate), `path` (a line through dots) and `short` (a
    text of at most so many characters)."""
    made = jinja2.Environment(
        loader=jinja2.PackageLoader("condu.report"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        finalize=_visible,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    made.filters.update(
        percent=_percent,
        range=lambda spread: spread.range(_percent),
        place=_place,
        path=_path,
        short=_short,
    )
    return made


def source_of(made: jinja2.Environment, template: str) -> str:
    """A file of the templates as it stands."""
    assert made.loader is not None
    return made.loader.get_source(made, template)[0]


def digest(text: str) -> str:
    """What a content security policy calls the sha256 of an inline element."""
    return base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()


def _visible(value: Any) -> Any:
    """Names may hold control characters, marks that turn the text round, halves of characters."""
    if isinstance(value, str) and not isinstance(value, Markup):
        return printable(value)
    return value


def _percent(value: float) -> str:
    return percent(value).replace("-", "−")


def _place(value: float) -> str:
    return f"{value:.1f}".removesuffix(".0")


def _path(dots: Sequence[Dot]) -> str:
    return "M" + "L".join(f"{_place(dot.x)} {_place(dot.y)}" for dot in dots)


def _short(text: str, length: int) -> str:
    return text if len(text) <= length else f"{text[: length - 1]}…"
