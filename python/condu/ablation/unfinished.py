"""What an ablation has measured so far, in a file, so that it goes on after an interruption."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from condu.record import versions
from condu.runfolder import write_text
from condu_ext.fingerprint import file_fingerprint

if TYPE_CHECKING:
    from condu.config import RunConfig
    from condu.tuning import Trained

# not progress.json: the results may go into the run's folder, which has one
FILES = {False: "ablation-unfinished.json", True: "ablation-unfinished-last.json"}
"""By whether only the last session is evaluated: neither takes the other's place."""


class Unfinished:
    """``rows`` of the results by the names of their variants, and the ``seconds`` that they took.

    Those of an earlier call over the same sessions are there if its configuration, models and
    versions of this software are the same; otherwise none, and ``outdated`` says that there were
    some. Without a ``folder`` they are kept in memory alone.
    """

    def __init__(
        self, folder: Path | None, config: RunConfig, models: Sequence[Trained], *, last: bool
    ) -> None:
        self.rows: dict[str, Mapping[str, Any]] = {}
        self.seconds = 0.0
        self.outdated = False
        self._file = None if folder is None else folder / FILES[last]
        if self._file is None:
            return
        self._basis = {
            "configuration": config.model_dump(mode="json"),
            "models": [file_fingerprint(model.path) for model in models],
            "versions": versions(),
        }
        kept = _read(self._file)
        if kept.get("basis") == self._basis:
            self.rows = {row["name"]: row for row in kept["rows"]}
            self.seconds = kept["seconds"]
        else:
            self.outdated = bool(kept)

    def add(self, rows: Sequence[Mapping[str, Any]], seconds: float) -> None:
        """Keep some more rows; ``seconds`` are those of all."""
        self.rows |= {row["name"]: row for row in rows}
        self.seconds = seconds
        if self._file is not None:
            kept = {
                "basis": self._basis,
                "rows": list(self.rows.values()),
                "seconds": seconds,
            }
            write_text(self._file, json.dumps(kept, allow_nan=False))

    def remove(self) -> None:
        """The results are in a place of their own now."""
        if self._file is not None:
            self._file.unlink(missing_ok=True)


def _read(file: Path) -> dict[str, Any]:
    """Nothing of a file that is not there or that something else has spoilt: it can be measured
    again."""
    try:
        kept = json.loads(file.read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):
        return {}
    return kept if isinstance(kept, dict) else {}
