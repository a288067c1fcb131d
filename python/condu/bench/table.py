"""A record as a Markdown table: one line a case. Numbers are rounded here and nowhere else."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from condu.bench.record import Record
from condu.bench.suite import FAILED

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


def legend() -> list[str]:
    """What columns and marks of every table mean."""
    return [
        "GB are what the operation has to move at the least, every input read and every output "
        "written once; GB/s is GB over the median, % of copy the median of its ratios to a copy "
        "of memory timed by turns. T: models of a unify, otherwise tasks that the incoming state "
        "holds. × NAME: how many times as long that formulation in pure PyTorch takes; ¹ of a "
        "single timed call. Peak: memory above the inputs, the result included.",
        "`absorb_` works in place and reads its inputs once; `absorb_+check`, the default, reads "
        "them twice, the first time to check them, which GB does not count. All kinds of absorb "
        "are compared with the same baselines, which make a new state as `absorb` does: `absorb_` "
        "and `absorb_+check` also save that memory's allocation. bf16/bf16: a bfloat16 state; all "
        "others float32.",
    ]


def _notes(record: Record) -> list[str]:
    copy = record["copy"]
    rate = copy["bytes_per_second"]
    ceiling = (
        f"Copy: {copy['how']}, {copy['bytes_moved'] / 1e9:.2f} GB read and written a call"
        + (f", {rate / 1e9:.1f} GB/s (median)" if rate else "")
        + "."
    )
    compared = [case for case in record["cases"] if case["checked"]]
    counts = sorted({case["checked"] for case in compared})
    check = (
        "Before it was timed every result was compared with the reference, bit for bit: unified "
        "delta and masks, or the expert, in the first, middle and last elements of every tensor "
        f"({' to '.join(f'{count:,}' for count in counts[:1] + counts[1:][-1:])} elements a case; "
        "all where that is the model's size). The sums of the largest and the smallest tensors "
        "and all rescalers were compared with float64, to 1e-6."
        if compared
        else "Nothing was measured."
    )
    names = record["settings"]["baselines"]
    different = [
        f"{name} {sum(_different(c, name) for c in compared):,}"
        for name in names
        if any(name in c["baselines"] for c in compared)
    ]
    lines = [*legend(), ceiling, check]
    if different:
        lines.append(
            "Elements in which a baseline's result is not the kernel's, over all cases: "
            + ", ".join(different)
            + ". A baseline with more of them than rounding explains failed; an expert that was "
            "compiled may differ by 1e-6 of |θ_0| + |δ| (in 16 bits by the last bit), for a "
            "compiler contracts θ_0 + λ·u to one rounding."
        )
    lines += [
        f"{name} failed on {case['operation']} {case['model']} {case['dtype']} T={case['tasks']}: "
        f"{baseline['reason']}"
        for case in record["cases"]
        for name, baseline in case["baselines"].items()
        if baseline["status"] == FAILED
    ]
    patience = record["settings"]["patience_seconds"]
    if "¹" in "".join(table(record["cases"], names)):
        lines.append(f"¹ one call: it took longer than {patience:g} s, or one call was asked for.")
    return lines


def _different(case: Record, name: str) -> int:
    return case["baselines"].get(name, {}).get("different") or 0
