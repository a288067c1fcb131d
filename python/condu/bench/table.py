"""A record as a Markdown table: one line a case. Numbers are rounded here and nowhere else."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from condu.bench.record import Record

UNDEFINED = "–"


def lines_of(record: Record) -> list[str]:
    """The whole table with the machine above and what the columns mean below."""
    names = record["settings"]["baselines"]
    return [
        machine_line(record),
        "",
        *table(record["cases"], names),
        "",
        *_notes(record),
    ]


def machine_line(record: Record) -> str:
    """Hardware, versions, date and commit."""
    m = record["machine"]
    if m["gpu"]:
        where = f"{m['gpu']['name']}, driver {m['gpu']['driver']}, CUDA {m['gpu']['cuda']}"
    else:
        where = f"{m['cpu']}, {m['threads']} of {m['cores']} cores, {m['isa']}"
    commit = f", commit {record['commit']}" if record["commit"] else ""
    return f"{where}, torch {m['torch']}, condu {m['condu']}, {record['date']}{commit}"


def table(cases: Sequence[Record], baselines: Sequence[str]) -> list[str]:
    """Markdown lines: header and one line a case."""
    header = [
        "operation",
        "model",
        "dtype",
        "T",
        "median ms",
        "p20–p80",
        "GB",
        "GB/s",
        "% of copy",
        *(f"× {name}" for name in baselines),
        "peak MiB",
    ]
    rows = [header, ["---"] * 4 + ["---:"] * (len(header) - 4)]
    rows += [_row(case, baselines) for case in cases]
    return [f"| {' | '.join(row)} |" for row in rows]


def _row(case: Record, baselines: Sequence[str]) -> list[str]:
    which = [case["operation"], case["model"], case["dtype"], str(case["tasks"])]
    size = digits(case["floor_bytes"] / 1e9)
    if case["seconds"] is None:
        return [*which, case["status"], UNDEFINED, size, *[UNDEFINED] * (len(baselines) + 3)]
    seconds = case["seconds"]
    return [
        *which,
        digits(1e3 * seconds["median"]),
        f"{digits(1e3 * seconds['p20'])}–{digits(1e3 * seconds['p80'])}",
        size,
        digits(case["bytes_per_second"] / 1e9),
        f"{100 * case['ratio']:.0f}",
        *(speedup(case["baselines"].get(name)) for name in baselines),
        _mebibytes(case["peak_extra_bytes"]),
    ]


def _mebibytes(size: int | None) -> str:
    return UNDEFINED if size is None else f"{size / 2**20:,.0f}"


def speedup(baseline: dict[str, Any] | None) -> str:
    """How many times the kernel is faster than a baseline, or why that is unknown."""
    if baseline is None:
        return UNDEFINED
    if baseline["speedup"] is None:
        return str(baseline["status"])
    once = "¹" if baseline["seconds"]["runs"] == 1 else ""
    return f"{digits(baseline['speedup'])}{once}"


def digits(value: float) -> str:
    """Three significant digits without an exponent; whole numbers above 100."""
    if value >= 100:
        return f"{value:,.0f}"
    return f"{value:.1f}" if value >= 10 else f"{value:.2f}"


def _notes(record: Record) -> list[str]:
    copy = record["copy"]
    rate = copy["bytes_per_second"]
    ceiling = (
        f"Copy: {copy['how']}, {copy['bytes_moved'] / 1e9:.2f} GB read and written a call"
        + (f", {rate / 1e9:.1f} GB/s (median)" if rate else "")
        + "; timed by turns with each case, median of the paired ratios."
    )
    compared = [case for case in record["cases"] if case["checked"]]
    counts = sorted({case["checked"] for case in compared})
    check = (
        "Every result was compared with the reference before it was timed, bit for bit "
        f"({' to '.join(f'{count:,}' for count in counts[:1] + counts[1:][-1:])} elements a case)."
        if compared
        else "Nothing was measured."
    )
    names = record["settings"]["baselines"]
    different = [
        f"{name} {sum(_different(c, name) for c in compared):,}"
        for name in names
        if any(name in c["baselines"] for c in compared)
    ]
    lines = [
        "GB are what the operation has to move at the least, the rate is GB over the median. T: "
        "models of a unify, otherwise tasks that the incoming state holds. `absorb_` works in "
        "place and reads its inputs once; `absorb_+check`, the default, once more before it "
        "writes. bf16/bf16: a bfloat16 state; all others float32. Peak: memory above the inputs, "
        "the result included.",
        ceiling,
        check,
    ]
    if different:
        lines.append(
            "Elements in which a baseline's result is not the kernel's, over all cases: "
            + ", ".join(different)
            + "."
        )
    patience = record["settings"]["patience_seconds"]
    if "¹" in "".join(table(record["cases"], names)):
        lines.append(f"¹ one call: it took longer than {patience:g} s, or one call was asked for.")
    return lines


def _different(case: Record, name: str) -> int:
    return case["baselines"].get(name, {}).get("different") or 0
