"""A folder in which files are written piece by piece, from several processes, until a commit.

Nothing in it counts before the commit, which is a rename made by one process: of ``config.json``
for a state, of the folder itself for a model. A run that was killed leaves its files and its
journal (:mod:`condu.checkpoint.journal`); the same command finds both and goes on.
"""

from __future__ import annotations

import os
import shutil
import time
import uuid
from collections.abc import Iterable, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path

from condu.checkpoint.costs import size_text
from condu.checkpoint.file_writer import FileWriter
from condu.checkpoint.journal import Journal, Record, journals, read_journals
from condu_ext.files import sync
from condu_ext.fingerprint import file_fingerprint
from condu_ext.manifest import CONFIG, CheckpointError, generation_of, read_manifest
from condu_ext.storage import LOCK, writer_lock

_PATIENCE = 5.0  # seconds until all see a file: those that share a disk may remember what it had


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
        claimed: whether this process holds the folder, and nothing in it counts yet.
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
        self._files = FileWriter(folder)
        self.write, self.settle = self._files.write, self._files.settle

    def claim(self) -> None:
        """Make the folder, keep other writers out, and look for what an earlier run finished. For
        one process.

        Raises:
            OSError: the folder cannot be made or written.
            RuntimeError: another process is writing there.
        """
        new = [self.folder / LOCK, self.folder, *self.folder.parents]
        self._made = [path for path in new if not path.exists()]
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._held.enter_context(writer_lock(self.folder))
        except OSError:
            self._unmake()
            raise
        generation, self.finished = read_journals(self.folder, self._job)
        if generation is not None:
            self.generation = generation

    def mark(self) -> str:
        """Leave a mark in the lock, for the others to find; by the process that claimed it."""
        mark = uuid.uuid4().hex
        (self.folder / LOCK).write_text(mark)
        self._held.callback(self._unmark)
        return mark

    def _unmark(self) -> None:
        with suppress(OSError):  # it may have been removed, with the folder or without
            os.truncate(self.folder / LOCK, 0)

    def find(self, mark: str) -> None:
        """Look for another process's mark.

        Raises:
            OSError: it is not there, so this is another folder than the other process's.
        """
        begin = time.monotonic()
        while not self._shows(mark):
            if time.monotonic() - begin > _PATIENCE:
                raise OSError(
                    f"{self.folder.resolve()} is not the folder that the first process writes: "
                    "all processes must see the same one"
                )
            time.sleep(0.1)

    def _shows(self, mark: str) -> bool:
        with suppress(OSError):
            return (self.folder / LOCK).read_text() == mark
        return False

    def start_anew(self, stale: Iterable[str]) -> None:
        """The folder is as it was checked, and everything that is written from here on is this
        run's. If there is nothing to go on from: remove what another run left, its journals and
        ``stale``, and choose a generation."""
        self.claimed = True
        if self.finished:
            return
        self._remove(stale)
        numbers = (generation_of(name) or 0 for name in os.listdir(self.folder))
        self.generation = 1 + max(numbers, default=0)

    def make_room(self, unfinished: Iterable[Sequence[NewFile]], more: int = 0) -> None:
        """Remove what there is of the files of these shards, and look whether all will fit, and
        ``more`` bytes beside them.

        Raises:
            OSError: the disk has less room than they take.
        """
        wanted = more
        for file in (file for files in unfinished for file in files):
            (self.folder / file.name).unlink(missing_ok=True)
            wanted += file.size
        if (free := shutil.disk_usage(self.folder).free) < wanted:
            raise OSError(
                f"{self.folder}: {size_text(wanted)} are to be written, but the disk has "
                f"{size_text(free)} free"
            )

    def begin(self, rank: int) -> None:
        """Open this process's journal."""
        self._journal = Journal(self.folder, rank, self._job, self.generation)

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

    def check_whole(self, records: Iterable[Record]) -> None:
        """All files of all shards are there.

        Raises:
            OSError: one is missing, or has another size than what was written.
        """
        for name, expected in (item for record in records for item in record.files.items()):
            size = (self.folder / name).stat().st_size
            if size != expected["size"]:
                raise OSError(
                    f"{self.folder / name}: has {size} bytes, {expected['size']} were written; "
                    "was it changed meanwhile?"
                )

    def commit_state(self, stale: Iterable[str]) -> None:
        """After the commit of a state: remove journals and ``stale``."""
        self.claimed = False
        with suppress(OSError):  # the new state is in force; the next run cleans up again
            self._remove(stale)

    def commit_folder(self, place: Path) -> None:
        """The commit of a temporary folder: it becomes ``place``.

        Raises:
            OSError: there is something else.
        """
        for path in (*self.folder.rglob("*"), self.folder):
            sync(path)
        os.replace(self.folder, place)
        self.claimed = False
        for path in (*journals(place), place / LOCK):  # needed until here
            path.unlink(missing_ok=True)
        sync(place.parent)

    def commit_file(self, name: str, place: Path) -> None:
        """The commit of a single file of a temporary folder: it becomes ``place``.

        Raises:
            OSError: it cannot be put there.
        """
        os.replace(self.folder / name, place)
        self.claimed = False
        sync(place.parent)
        shutil.rmtree(self.folder, ignore_errors=True)

    def abandon(self, files: Iterable[str]) -> None:
        """Remove this run's files and journals, and the folders that it made, where they are empty
        then; nothing that the folder's state lists. For the process that claimed the folder."""
        if self._temporary:
            shutil.rmtree(self.folder, ignore_errors=True)
        else:
            with suppress(OSError, CheckpointError):  # an error is on its way already
                kept = read_manifest(self.folder).files if (self.folder / CONFIG).exists() else {}
                self._remove(name for name in files if name not in kept)
        self._unmake()

    def close(self) -> None:
        """Close all files; another process may write in the folder again."""
        if self._journal is not None:
            self._journal.close()
        self._files.close()
        self._held.close()

    def _remove(self, names: Iterable[str]) -> None:
        for path in (*journals(self.folder), *(self.folder / name for name in names)):
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            else:
                path.unlink(missing_ok=True)

    def _unmake(self) -> None:
        for path in self._made:
            with suppress(OSError):
                path.rmdir() if path.is_dir() else path.unlink()
