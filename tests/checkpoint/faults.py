"""Calls that change a disk, counted, and made to fail or to be the last ones of their process."""

from __future__ import annotations

import errno
import os
import signal
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

CALLS = ("pwrite", "fsync", "replace", "unlink", "mkdir")


@dataclass(frozen=True)
class Noted:
    """True once the journals in a folder list so many shards."""

    folder: Path
    shards: int = 1

    def __call__(self, number: int) -> bool:
        journals = self.folder.glob(".unfinished-*.jsonl")
        return sum(j.read_text().count("]}\n") for j in journals) >= self.shards


def always(number: int) -> bool:
    return True


class Disk:
    """Watches this process's calls from ``watch`` on; for a process of its own.

    Args:
        at: number of the call at which it happens, counted from 0, or when it does, or None: never.
        happen: what does, instead of the call; gets the call and its arguments.
        calls: those that count.

    Attributes:
        count: calls so far.
        written: bytes written by pwrite, by name of the file.
    """

    def __init__(
        self,
        at: int | Callable[[int], bool] | None = None,
        happen: Callable[..., Any] | None = None,
        calls: tuple[str, ...] = CALLS,
    ) -> None:
        self.at, self.happen = at, happen or killed
        self.count = 0
        self.written: dict[str, int] = {}
        self._lock = threading.Lock()
        for name in calls:
            setattr(os, name, self._counted(getattr(os, name)))

    def _counted(self, call: Callable[..., Any]) -> Callable[..., Any]:
        def counted(*arguments: Any, **options: Any) -> Any:
            with self._lock:
                number, self.count = self.count, self.count + 1
            if self.at(number) if callable(self.at) else number == self.at:
                return self.happen(call, *arguments, **options)
            result = call(*arguments, **options)
            if call.__name__ == "pwrite":
                name = os.path.basename(os.readlink(f"/proc/self/fd/{arguments[0]}"))
                with self._lock:
                    self.written[name] = self.written.get(name, 0) + result
            return result

        return counted


def killed(call: Callable[..., Any], *arguments: Any, **options: Any) -> None:
    """The process is killed, half-way through a write."""
    if call.__name__ == "pwrite":
        descriptor, data, offset = arguments
        call(descriptor, data[: len(data) // 2], offset)
    os.kill(os.getpid(), signal.SIGKILL)


def full(call: Callable[..., Any], *arguments: Any, **options: Any) -> None:
    """The disk is full."""
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def interrupted(call: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
    """Someone presses ctrl-C meanwhile."""
    os.kill(os.getpid(), signal.SIGINT)
    return call(*arguments, **options)


def stopped(call: Callable[..., Any], *arguments: Any, **options: Any) -> None:
    """The process hangs."""
    os.kill(os.getpid(), signal.SIGSTOP)


def slow(call: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
    time.sleep(0.3)
    return call(*arguments, **options)
