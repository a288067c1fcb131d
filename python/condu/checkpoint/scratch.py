"""A file for the time of a run, of which a killed run leaves no second one behind."""

from __future__ import annotations

import fcntl
import itertools
import os
import tempfile
from pathlib import Path

import xxhash


class ScratchFile:
    """A file that one process alone has, removed by :meth:`close`.

    Its name follows from its purpose: what a killed run left is taken over by the next one like it.
    Others that run at the same time, for the same purpose, get files of other numbers.

    Raises:
        OSError: there can be no file.
    """

    def __init__(self, purpose: str, folder: Path | None = None) -> None:
        """``folder``: None for the system's folder for temporary files."""
        place = folder or Path(tempfile.gettempdir())
        name = f".condu-{xxhash.xxh3_64_hexdigest(purpose.encode())}"
        for number in itertools.count():
            self.path = place / f"{name}-{number}.part"
            self._lock = os.open(self.path, os.O_RDWR | os.O_CREAT, 0o600)
            if self._is_mine():
                os.truncate(self._lock, 0)
                return
            os.close(self._lock)

    def _is_mine(self) -> bool:
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # whoever had it may have removed it meanwhile
            return os.path.samestat(os.fstat(self._lock), self.path.stat())
        except (BlockingIOError, FileNotFoundError):
            return False

    def close(self) -> None:
        self.path.unlink(missing_ok=True)
        os.close(self._lock)
