"""Writes the benchmark table of README.md from the records in benchmarks/results.

    python benchmarks/readme_table.py           # rewrite the part between the two markers
    python benchmarks/readme_table.py --check   # fail if it is not what the records say

Of each machine the records of the newest date count. The README shows eight tasks, and for unify
and absorb_ on float32 models other numbers too, where they fitted into memory; the whole table lies
beside the record.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from condu.bench.record import Record, read_record
from condu.bench.suite import NO_MEMORY
from condu.bench.table import legend, machine_line, table

ROOT = Path(__file__).resolve().parent.parent
BEGIN = "<!-- benchmarks: written by benchmarks/readme_table.py -->"
END = "<!-- benchmarks: end -->"
TASKS = 8


def newest_records(results: Path) -> list[tuple[Path, Record]]:
    """The records of each machine's newest date, by machine and folder."""
    found: dict[tuple[str, str, int], list[tuple[Path, Record]]] = {}
    for file in sorted(results.glob("*/bench.json")):
        record = read_record(file)
        machine = record["machine"]
        gpu = machine["gpu"]["name"] if machine["gpu"] else ""
        key = (gpu, machine["cpu"], 0 if gpu else machine["threads"])
        found.setdefault(key, []).append((file, record))
    newest = []
    for key in sorted(found):
        last = max(record["date"] for _, record in found[key])
        newest += [(file, record) for file, record in found[key] if record["date"] == last]
    return newest


def lines_of(records: Sequence[tuple[Path, Record]]) -> list[str]:
    """The part of the README between the markers."""
    lines = []
    for device, what in (("cpu", "CPU"), ("cuda", "CUDA")):
        found = [(file, record) for file, record in records if record["device"] == device]
        if not found:
            lines += [f"{what}: not measured with `condu bench`.", ""]
        for file, record in found:
            shown = [case for case in record["cases"] if _is_shown(case)]
            folder = f"benchmarks/results/{file.parent.name}"
            rate = record["copy"]["bytes_per_second"]
            copy = f"; copy {rate / 1e9:.1f} GB/s" if rate else ""
            lines += [
                f"{what}: {machine_line(record)}{copy}. "
                f"Everything measured: [{folder}]({folder}/bench.md)",
                "",
                *table(shown, record["settings"]["baselines"]),
                "",
            ]
    if records:
        for note in legend():
            lines += [note, ""]
    return lines


def _is_shown(case: Record) -> bool:
    plain = case["dtype"] == "fp32" and case["operation"] in ("unify", "absorb_")
    fits = case["status"] != NO_MEMORY  # the others stand in the record
    return bool(fits and (case["tasks"] == TASKS or plain))


def rewritten(readme: str, lines: Sequence[str]) -> str:
    """The README with other lines between its markers.

    Raises:
        ValueError: it does not have both, once each and in order.
    """
    before, begin, rest = readme.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end or BEGIN in rest or END in after:
        raise ValueError(f"README.md: expected one {BEGIN!r} and then one {END!r}")
    return "\n".join([before + BEGIN, "", *lines, END + after])


def main(arguments: Sequence[str] | None = None, root: Path = ROOT) -> int:
    parser = argparse.ArgumentParser(description="The benchmark table of README.md.")
    parser.add_argument("--check", action="store_true", help="fail if README.md is out of date")
    chosen = parser.parse_args(arguments)
    readme = root / "README.md"
    old = readme.read_text()
    new = rewritten(old, lines_of(newest_records(root / "benchmarks" / "results")))
    if chosen.check:
        if old != new:
            print("README.md: run python benchmarks/readme_table.py", file=sys.stderr)
        return int(old != new)
    readme.write_text(new)
    return 0


if __name__ == "__main__":
    sys.exit(main())
