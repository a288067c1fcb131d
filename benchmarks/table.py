"""The table of a benchmark run, printed at its end and written with the machine it ran on."""

from __future__ import annotations

import json
import platform
import subprocess
from dataclasses import asdict, dataclass
from datetime import date
from pathlib import Path

import torch

import condu_ext as cx


@dataclass
class Row:
    """One operation: seconds (medians), extra peak memory in MiB."""

    operation: str
    condu_seconds: float
    pytorch_seconds: float
    condu_mib: float
    pytorch_mib: float
    gigabytes: float

    @property
    def speedup(self) -> float:
        return self.pytorch_seconds / self.condu_seconds


class Table:
    """Rows in the order in which the benchmarks ran."""

    def __init__(self) -> None:
        self.rows: list[Row] = []
        self.copy_rate: float | None = None  # GB/s of torch's copy, bytes read and written

    def add(self, row: Row) -> None:
        self.rows.append(row)

    def lines(self) -> list[str]:
        """Markdown."""
        if not self.rows:
            return []
        lines = [
            "| operation | PyTorch s | condu s | × | GB/s | PyTorch MiB | condu MiB |",
            "|---|---|---|---|---|---|---|",
        ]
        lines += [
            f"| {r.operation} | {r.pytorch_seconds:.2f} | {r.condu_seconds:.3f} "
            f"| {r.speedup:.0f} | {r.gigabytes / r.condu_seconds:.1f} "
            f"| {r.pytorch_mib:,.0f} | {r.condu_mib:,.0f} |"
            for r in self.rows
        ]
        if self.copy_rate:
            lines += ["", f"torch's copy in the same run: {self.copy_rate:.1f} GB/s"]
        return ["", machine(), "", *lines]

    def write(self, folder: Path) -> None:
        """``fusion.json`` and ``fusion.md`` in the folder."""
        folder.mkdir(parents=True, exist_ok=True)
        figures = [asdict(row) | {"speedup": row.speedup} for row in self.rows]
        record = {
            "machine": machine(),
            "date": date.today().isoformat(),
            "copy_gigabytes_per_second": self.copy_rate,
            "rows": figures,
        }
        (folder / "fusion.json").write_text(json.dumps(record, indent=1) + "\n")
        (folder / "fusion.md").write_text("\n".join(self.lines()[1:]) + "\n")


def machine() -> str:
    """Processor, threads, instruction set, versions."""
    listed = subprocess.run(["lscpu"], capture_output=True, text=True, check=False).stdout
    names = [line.split(":")[1].strip() for line in listed.splitlines() if "Model name" in line]
    info = cx.build_info()
    return (
        f"{(names or [platform.processor()])[0]}, {info['threads']} threads, "
        f"{info['cpu_isa']}, torch {torch.__version__}, condu {info['version']}, "
        f"{date.today().isoformat()}"
    )
