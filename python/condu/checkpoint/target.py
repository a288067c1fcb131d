"""A folder in which files are written piece by piece, from several processes, until a commit.

Nothing in it counts before the commit, which is a rename made by one process: of ``config.json``
for a state, of the folder itself for a model. A run that was killed leaves its files and its
journal (:mod:`condu.checkpoint.journal`); the same command finds both and goes on.
"""

from __future__ import annotations

import os
import shutil
import threading
from collections.abc import Mapping
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path

from condu.checkpoint.journal import Journal, Record, journals, read_journals
from condu_ext.files import sync
from condu_ext.fingerprint import file_fingerprint
from condu_ext.manifest import generation_of
from condu_ext.storage import writer_lock


@dataclass(frozen=True)
class NewFile:
    """A file to write: its name, its first bytes, and its size when it is complete."""

    name: str
    header: bytes
    size: int


class Target:
    """One process's view of the folder.

    Attributes:
        generation: number that the names of this run's files carry, where they carry one.
        finished: the shards that an earlier run of the same job finished.
        claimed: whether this process holds the folder.
    """

    def __init__(self, folder: Path, job: str, *, temporary: bool) -> None:
        """``temporary``: the folder holds nothing but this run's files; else a state's folder."""
        self.folder = folder
        self._temporary = temporary
        self.generation = 0
        self.claimed = False
        self.finished: dict[int, Record] = {}
        self._job = job
        self._made: list[Path] = []
        self._held = ExitStack()
        self._journal: Journal | None = None
        self._descriptors: dict[str, int] = {}
        self._lock = threading.Lock()

    def claim(self) -> None:
        """Make the folder, keep other writers out, and look for what an earlier run finished. For
        one process.

        Raises:
            OSError: the folder cannot be made or written.
            RuntimeError: another process is writing there.
        """
        missing = [p for p in (self.folder, *self.folder.parents) if not p.exists()]
        self.folder.mkdir(parents=True, exist_ok=True)
        self._made = missing
        self._held.enter_context(writer_lock(self.folder))
        generation, self.finished = read_journals(self.folder, self._job)
        if generation is None:
            numbers = (generation_of(name) or 0 for name in os.listdir(self.folder))
            generation = 1 + max(numbers, default=0)
        self.generation = generation
        self.claimed = True

    def forget(self, files: list[str]) -> None:
        """Remove what an earlier run of another job left: its journals, and ``files``."""
        for file in (*journals(self.folder), *(self.folder / name for name in files)):
            file.unlink(missing_ok=True)

    def check_room(self, files: Mapping[int, list[NewFile]]) -> None:
        """Raises OSError if the disk has less room than the files of these shards will take."""
        wanted = 0
        for file in (file for group in files.values() for file in group):
            with suppress(FileNotFoundError):
                wanted -= min(file.size, (self.folder / file.name).stat().st_blocks * 512)
            wanted += file.size
        if (free := shutil.disk_usage(self.folder).free) < wanted:
            raise OSError(
                f"{self.folder}: {wanted / 1e9:.1f} GB are to be written, but the disk has "
                f"{free / 1e9:.1f} GB free"
            )

    def begin(self, rank: int) -> None:
        """Open this process's journal."""
        self._journal = Journal(self.folder, rank, self._job, self.generation)

    def write(self, name: str, offset: int, data: memoryview | bytes) -> None:
        """Put bytes at their place in a file.

        Raises:
            OSError: naming the file; the disk is full, and so on.
        """
        try:
            descriptor = self._open(name)
            rest = memoryview(data)
            while rest:
                count = os.pwrite(descriptor, rest, offset)
                rest, offset = rest[count:], offset + count
        except OSError as error:
            error.filename = error.filename or str(self.folder / name)
            raise

    def settle(self, names: list[str]) -> None:
        """Close files of this process, with all that was written on disk."""
        for name in names:
            with self._lock:
                descriptor = self._descriptors.pop(name, None)
            if descriptor is None:
                continue
            try:
                os.fsync(descriptor)
            except OSError as error:
                error.filename = error.filename or str(self.folder / name)
                raise
            finally:
                os.close(descriptor)

    def fingerprint(self, name: str) -> str:
        """xxh3 of a file, read anew."""
        return file_fingerprint(self.folder / name)

    def intact(self, record: Record) -> bool:
        """Whether the files of a finished shard are those that it was finished with."""
        for name, expected in record.files.items():
            file = self.folder / name
            if not file.is_file() or file.stat().st_size != expected["size"]:
                return False
            if file_fingerprint(file) != expected["xxh3"]:
                return False
        return True

    def note(self, shard: int, record: Record) -> None:
        """A shard is finished and on disk."""
        assert self._journal is not None
        self._journal.add(shard, record)

    @property
    def has_finished(self) -> bool:
        """Whether a journal lists a finished shard."""
        return bool(read_journals(self.folder, self._job)[1])

    def committed(self) -> None:
        """After the commit, on the process that made it: the journals are no longer needed."""
        sync(self.folder)
        with suppress(OSError):
            for file in journals(self.folder):
                file.unlink(missing_ok=True)

    def abandon(self, files: list[str]) -> None:
        """Remove this run's files and journals, and the folders that it made, where they are empty
        then. For the process that claimed the folder."""
        self.forget(files)
        if self._temporary:
            shutil.rmtree(self.folder, ignore_errors=True)
        elif self.folder in self._made:
            (self.folder / ".lock").unlink(missing_ok=True)
        for folder in self._made:
            with suppress(OSError):
                folder.rmdir()

    def close(self) -> None:
        """Close all files; another process may write in the folder again."""
        if self._journal is not None:
            self._journal.close()
        with self._lock:
            while self._descriptors:
                os.close(self._descriptors.popitem()[1])
        self._held.close()

    def _open(self, name: str) -> int:
        with self._lock:
            if name not in self._descriptors:
                flags = os.O_RDWR | os.O_CREAT
                self._descriptors[name] = os.open(self.folder / name, flags, 0o666)
            return self._descriptors[name]
