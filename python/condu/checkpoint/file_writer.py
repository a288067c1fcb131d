"""Files of a folder that are written piece by piece, by any number of threads."""

from __future__ import annotations

import os
import threading
from collections import OrderedDict
from collections.abc import Iterable
from pathlib import Path

from condu_ext.files import naming

_OPEN_FILES = 128


class FileWriter:
    """The files of a folder that this process writes.

    The latest used stay open: a state with many tasks has more files a shard than a process may
    have open. What was written is on disk after ``settle`` all the same.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._open: OrderedDict[str, _Descriptor] = OrderedDict()
        self._unsettled: set[str] = set()
        self._lock = threading.Lock()

    def write(self, name: str, offset: int, data: memoryview | bytes) -> None:
        """Put bytes at their place in a file.

        Raises:
            OSError: naming the file; the disk is full, and so on.
        """
        with naming(self._folder / name):
            descriptor = self._descriptor(name)  # open until its last writer lets go of it
            rest = memoryview(data)
            while rest:
                count = os.pwrite(descriptor.number, rest, offset)
                rest, offset = rest[count:], offset + count

    def settle(self, names: Iterable[str]) -> None:
        """Close those of the files that this process wrote, with all of it on disk.

        Raises:
            OSError: naming the file.
        """
        for name in self._unsettled.intersection(names):
            with naming(self._folder / name):
                descriptor = self._descriptor(name)  # any descriptor syncs what all have written
                with self._lock:
                    self._open.pop(name, None)
                    self._unsettled.discard(name)
                os.fsync(descriptor.number)

    def close(self) -> None:
        with self._lock:
            self._open.clear()

    def _descriptor(self, name: str) -> _Descriptor:
        with self._lock:
            if name not in self._open:
                self._open[name] = _Descriptor(self._folder / name)
                self._unsettled.add(name)
            self._open.move_to_end(name)
            if len(self._open) > _OPEN_FILES:
                self._open.popitem(last=False)
            return self._open[name]


class _Descriptor:
    """A file that is closed with the last reference to it."""

    def __init__(self, file: Path) -> None:
        self.number = os.open(file, os.O_RDWR | os.O_CREAT, 0o666)

    def __del__(self) -> None:
        if hasattr(self, "number"):
            os.close(self.number)
