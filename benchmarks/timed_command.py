"""Runs a command of condu as a user does, and says what it took.

Time and memory are those of the whole process, from the interpreter's start to its end; what the
command says of itself is taken from the line that it prints last.
"""

from __future__ import annotations

import re
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

_SUMMARY = re.compile(
    r"in (?P<elapsed>[\d.]+) s \(.*"
    r"per worker: reading (?P<reading>[\d.]+) s, fusing (?P<fusing>[\d.]+) s, "
    r"writing (?P<writing>[\d.]+) s, checksums (?P<checksums>[\d.]+) s\), "
    r"then waited (?P<waited>[\d.]+) s for the disk"
)


@dataclass(frozen=True)
class Finished:
    """What a command took.

    Attributes:
        seconds: wall-clock time of the process.
        peak_bytes: its largest resident set; None for several processes.
        summary: the seconds of its last line, by what it did in them.
    """

    seconds: float
    peak_bytes: int | None
    summary: dict[str, float]

    @property
    def apart_from_fsync(self) -> float:
        """Seconds without those in which it waited for the disk after its last write."""
        return self.seconds - self.summary["waited"]


def run(*arguments: str, processes: int = 1) -> Finished:
    """``condu ARGUMENTS``, with torchrun if there are several processes.

    Raises:
        RuntimeError: it failed; with what it printed.
    """
    command = [sys.executable, "-m", "condu", *arguments]
    if processes > 1:
        launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node"]
        module = ["-m", "condu.checkpoint"]
        command = [sys.executable, *launcher, str(processes), *module, *arguments]
    begin = time.perf_counter()
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as process:
        peak = 0
        while process.poll() is None:  # it prints too little to fill the pipe
            peak = max(peak, _peak_of(process.pid))
            time.sleep(0.01)
        seconds = time.perf_counter() - begin
        assert process.stdout is not None
        output = process.stdout.read()
    found = _SUMMARY.search(output)
    if process.returncode or not found:
        raise RuntimeError(f"{' '.join(command)} ended with {process.returncode}:\n{output}")
    summary = {name: float(value) for name, value in found.groupdict().items()}
    return Finished(seconds, peak if processes == 1 else None, summary)


def _peak_of(process: int) -> int:
    """The largest resident set of a process so far. Not that of wait4, which starts with the size
    of the process that launched it."""
    try:
        status = Path(f"/proc/{process}/status").read_text()
    except OSError:  # it ended meanwhile
        return 0
    found = re.search(r"VmHWM:\s+(\d+) kB", status)
    return int(found[1]) * 1024 if found else 0
