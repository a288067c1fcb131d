"""What a run shows while it works: a bar on a terminal, one line per finished step elsewhere."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from typing import Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)


class RunProgress:
    """Progress of a run on `console`; with `quiet` nothing is shown. The default is quiet."""

    def __init__(self, console: Console | None = None, *, quiet: bool = False) -> None:
        self.console = console or Console(quiet=True)
        self.quiet = quiet or console is None

    def line(self, text: str) -> None:
        """One finished step."""
        if not self.quiet:
            self.console.print(text, highlight=False, markup=False, soft_wrap=True)

    @contextmanager
    def steps(self, label: str, total: int) -> Iterator[Callable[[float], None]]:
        """A bar of `total` steps with the loss and the time left; call what it yields with the loss
        after each step. Shown on a terminal only, and removed when it is full."""
        with self._bar(label, total, TextColumn("loss {task.fields[loss]}"), loss="–") as update:
            yield lambda loss: update(advance=1, loss=f"{loss:.3f}")

    @contextmanager
    def images(self, label: str, total: int) -> Iterator[Callable[[int], None]]:
        """A bar of `total` images with the time left; call what it yields with how many more are
        done. Shown and removed as `steps` is."""
        with self._bar(label, total) as update:
            yield lambda count: update(advance=count)

    def rounds(self, label: str, total: int) -> AbstractContextManager[Callable[[int], None]]:
        """The same of at most `total` rounds of some computation."""
        return self.images(label, total)

    @contextmanager
    def _bar(
        self, label: str, total: int, *columns: ProgressColumn, **fields: Any
    ) -> Iterator[Callable[..., None]]:
        """A bar with some columns of its own; call what it yields with what has changed."""
        if self.quiet or not self.console.is_terminal:
            yield _ignore
            return
        bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            *columns,
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            console=self.console,
            transient=True,
        )
        with bar:
            yield partial(bar.update, bar.add_task(label, total=total, **fields))


def _ignore(**changes: object) -> None:
    pass
