"""How processes that work side by side learn that one of them failed or is gone.

While a process works it exchanges nothing with the others, so it would hear of a failure when it is
done, perhaps hours later. Each therefore says every second, in the store through which they found
each other, that it is alive, and at once that it failed; and looks whether others did.
"""

from __future__ import annotations

import threading
import time
from contextlib import suppress
from typing import Protocol

_BEAT = 1.0  # seconds between two signs of life
_SILENCE = 20.0  # seconds after which a process without any is taken as gone


class Store(Protocol):
    """What is needed of a ``torch.distributed.Store``."""

    def set(self, key: str, value: str, /) -> object: ...
    def get(self, key: str, /) -> bytes: ...
    def check(self, keys: list[str], /) -> bool: ...


class OtherFailed(RuntimeError):
    """Another process failed; in the next step that all take it says itself what was wrong."""


class OtherGone(RuntimeError):
    """Another process ended, was interrupted, or hangs: it will take no further step."""


class Watch:
    """One process's eye on the others, in a thread of its own from ``start`` to ``stop``.

    Args:
        store: shared by all processes.
        run: begins the keys; no other run has the same.
    """

    def __init__(self, store: Store, run: str, rank: int, size: int) -> None:
        self._store, self._run, self._rank = store, run, rank
        self._heard = {other: (b"", time.monotonic()) for other in range(size) if other != rank}
        self._found: RuntimeError | None = None
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._look, name="condu watch", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        self._stopped.set()
        self._thread.join()

    def tell(self, what: str) -> None:
        """Tell the others that this process ``"failed"``, but takes the next step with them, or
        that it is ``"gone"``."""
        with suppress(RuntimeError):  # the store is gone: they know
            self._store.set(f"{self._run}/{what}", str(self._rank))

    def check(self) -> None:
        """Raises OtherFailed or OtherGone if that was seen; takes no time."""
        if self._found is not None:
            raise self._found

    def _look(self) -> None:
        beats = 0
        try:
            while self._found is None and not self._stopped.wait(_BEAT * bool(beats)):
                beats += 1
                self._store.set(f"{self._run}/{self._rank}", str(beats))
                if rank := self._said("gone"):
                    self._found = OtherGone(f"rank {rank.decode()} gave up")
                elif rank := self._said("failed"):
                    self._found = OtherFailed(f"rank {rank.decode()} failed")
                else:
                    self._listen()
        except RuntimeError as error:  # the process that holds the store is gone
            self._found = OtherGone(f"the processes lost each other: {error}")

    def _listen(self) -> None:
        now = time.monotonic()
        for rank, (before, since) in self._heard.items():
            if (said := self._said(str(rank))) != before:
                self._heard[rank] = said, now
            elif now - since > _SILENCE:
                self._found = OtherGone(f"rank {rank} is gone")

    def _said(self, key: str) -> bytes:
        key = f"{self._run}/{key}"
        return self._store.get(key) if self._store.check([key]) else b""
