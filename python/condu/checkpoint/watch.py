"""How processes that work side by side learn that one of them failed or is gone.

While a process works it exchanges nothing with the others, so it would hear of a failure when it is
done, perhaps hours later; and one that waits for the others would wait for ever if one hangs. Each
therefore says every second, in the store through which they found each other, that it is alive, and
at once that it failed; and looks whether others did. Before they exchange something, each waits
there until all have come.
"""

from __future__ import annotations

import threading
import time
from queue import SimpleQueue
from typing import Protocol

_BEAT = 1.0  # seconds between two signs of life
_GLANCE = 0.02  # seconds between two looks whether all have come
_SILENCE = 20.0  # seconds after which a process without any is taken as gone


class Store(Protocol):
    """What is needed of a ``torch.distributed.Store``."""

    def set(self, key: str, value: str, /) -> object: ...
    def get(self, key: str, /) -> bytes: ...
    def add(self, key: str, amount: int, /) -> int: ...
    def check(self, keys: list[str], /) -> bool: ...


class OtherFailed(RuntimeError):
    """Another process failed; in the next step that all take it says itself what was wrong."""


class OtherGone(RuntimeError):
    """Another process ended, was interrupted, or hangs: it will take no further step."""


class Watch:
    """One process's eye on the others, in a thread of its own from ``start`` to ``stop``.

    That thread alone talks to the store, for a store whose process hangs does not answer.

    Args:
        store: shared by all processes.
        run: begins the keys; no other run has the same.
    """

    def __init__(self, store: Store, run: str, rank: int, size: int) -> None:
        self._store, self._run, self._rank, self._size = store, run, rank, size
        now = time.monotonic()
        self._heard = {other: (b"", now) for other in range(size) if other != rank}
        self._looked = now
        self._failed: OtherFailed | None = None
        self._gone: OtherGone | None = None
        self._to_tell: SimpleQueue[str] = SimpleQueue()
        self._meeting = self._met = 0  # meetings that this process came to, and all came to
        self._stopped = False
        self._wake = threading.Event()
        self._news = threading.Condition()
        self._thread = threading.Thread(target=self._look, name="condu watch", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        """Stop looking, once everything is told."""
        self._stopped = True
        self._wake.set()
        self._thread.join(_BEAT)  # longer only if the store hangs

    def tell(self, what: str) -> None:
        """Tell the others that this process ``"failed"``, but takes the next step with them, or
        that it is ``"gone"``."""
        self._to_tell.put(what)
        self._wake.set()

    def check(self) -> None:
        """Raises OtherFailed or OtherGone if that was seen; takes no time."""
        self._check_all_there()
        if self._failed is not None:
            raise self._failed

    def meet(self) -> None:
        """Wait until all processes have come to a meeting; each comes to all of them, in order.

        Raises:
            OtherGone: one will not come.
        """
        self._meeting += 1
        self._wake.set()
        with self._news:
            while self._met < self._meeting:
                self._check_all_there()
                self._news.wait(_BEAT)

    def _check_all_there(self) -> None:
        if self._gone is not None:
            raise self._gone
        if time.monotonic() - self._looked > _SILENCE:
            raise OtherGone("the process that connects the others is gone")

    # ---- the thread ----------------------------------------------------------------------------

    def _look(self) -> None:
        beats, came = 0, 0
        try:
            while not (self._stopped and self._to_tell.empty()) and self._gone is None:
                self._wake.clear()
                while not self._to_tell.empty():
                    self._store.set(f"{self._run}/{self._to_tell.get()}", str(self._rank))
                came += self._come(came)
                if (now := time.monotonic()) > self._looked + _BEAT or not beats:
                    beats += 1
                    self._store.set(f"{self._run}/{self._rank}", str(beats))
                    self._listen(now)
                    self._looked = now
                self._wake.wait(_GLANCE if self._met < self._meeting else _BEAT)
        except RuntimeError as error:  # the process that holds the store is gone
            self._gone = OtherGone(f"the processes lost each other: {error}")
        with self._news:
            self._news.notify_all()

    def _come(self, came: int) -> int:
        """Say that this process came to the meeting, if it did, and look whether all have."""
        meeting = self._meeting
        if meeting == self._met:
            return 0
        comes, key = int(came < meeting), f"{self._run}/meeting {meeting}"
        if comes and self._store.add(key, 1) == self._size:
            self._store.set(f"{key} complete", "")
        if self._store.check([f"{key} complete"]):
            with self._news:
                self._met = meeting
                self._news.notify_all()
        return comes

    def _listen(self, now: float) -> None:
        if who := self._said("gone"):
            self._gone = OtherGone(f"rank {who.decode()} gave up")
        elif who := self._said("failed"):
            self._failed = OtherFailed(f"rank {who.decode()} failed")
        for rank, (before, since) in self._heard.items():
            if (said := self._said(str(rank))) != before:
                self._heard[rank] = said, now
            elif now - since > _SILENCE:
                self._gone = OtherGone(f"rank {rank} is gone")

    def _said(self, key: str) -> bytes:
        key = f"{self._run}/{key}"
        return self._store.get(key) if self._store.check([key]) else b""
