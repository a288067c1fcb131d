"""A command's progress on a terminal: what was read and written, how fast, and the time left."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)


@contextmanager
def progress_bar(
    label: str, *, shown: bool, console: Console | None = None
) -> Iterator[Callable[[int, int], None]]:
    """A bar on a console, by default the terminal's error stream, removed when the block ends; what
    it yields is :attr:`Options.progress`. Nothing is shown where there is no terminal."""
    console = console or Console(file=sys.stderr)
    if not (shown and console.is_terminal):
        yield lambda done, total: None
        return
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
    )
    lock = threading.Lock()
    with Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task(label, total=None)

        def advance(done: int, total: int) -> None:
            with lock:
                if total:
                    bar.update(task, total=total)
                bar.advance(task, done)

        yield advance
