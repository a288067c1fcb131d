"""A run as JSON: the machine, how it was measured, and every case's numbers."""

from __future__ import annotations

import json
import os
import platform
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from datetime import date
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch

import condu_ext as cx
from condu.bench.ceiling import Copy, cache_bytes, huge_pages
from condu.bench.suite import CaseResult, Settings

FORMAT = 1
Record = dict[str, Any]
_FLAGS = (
    "f16c",
    "avx2",
    "avx512f",
    "avx512bw",
    "avx512vbmi",
    "gfni",
    "avx512_bf16",
    "asimd",
    "sve",
)


def record_of(settings: Settings, copy: Copy, results: Sequence[CaseResult]) -> Record:
    """Everything that a reader needs to judge the numbers; sizes in bytes, times in seconds."""
    rates = [copy.moved / r.copy_seconds.median for r in results if r.copy_seconds]
    return {
        "format": FORMAT,
        "date": date.today().isoformat(),
        "commit": commit(),
        "machine": machine(settings.device),
        "device": settings.device.type,
        "settings": {
            "repeats": settings.repeats,
            "baselines": list(settings.baselines),
            "patience_seconds": settings.patience,
        },
        "copy": {
            "how": copy.how,
            "bytes_moved": copy.moved,
            "bytes_per_second": float(np.median(rates)) if rates else None,
        },
        "cases": [case_record(result) for result in results],
    }


def case_record(result: CaseResult) -> Record:
    """One case; ``speedup`` of a baseline is its median time over the kernel's."""
    case = result.case
    entry: Record = {
        "operation": case.operation,
        "model": case.model,
        "parameters": case.parameters,
        "tensors": len(case.shapes),
        "tasks": case.tasks,
        "dtype": case.precision,
        "floor_bytes": case.floor_bytes,
    }
    entry |= {key: value for key, value in asdict(result).items() if key not in ("case", "seconds")}
    entry["seconds"] = seconds = asdict(result.seconds) if result.seconds else None
    entry["bytes_per_second"] = case.floor_bytes / seconds["median"] if seconds else None
    for baseline in entry["baselines"].values():
        theirs = baseline["seconds"]
        baseline["speedup"] = theirs["median"] / seconds["median"] if theirs and seconds else None
    return entry


@cache
def machine(device: torch.device) -> Record:
    """Hardware, instruction set in use, threads, versions."""
    info = cx.build_info()
    cpuinfo = _first_block(Path("/proc/cpuinfo"))
    flags = cpuinfo.get("flags", cpuinfo.get("Features", "")).split()
    found: Record = {
        "cpu": cpuinfo.get("model name", platform.processor() or platform.machine()),
        "cores": os.cpu_count(),
        "cpu_flags": [flag for flag in _FLAGS if flag in flags],
        "cache_bytes": cache_bytes(torch.device("cpu")),
        "transparent_hugepages": huge_pages(),
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "isa": info["cpu_isa"],
        "threads": info["threads"],
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "condu": info["version"],
        "gpu": None,
    }
    if device.type == "cuda":
        gpu = torch.cuda.get_device_properties(device)
        found["gpu"] = {
            "name": gpu.name,
            "memory_bytes": gpu.total_memory,
            "capability": f"{gpu.major}.{gpu.minor}",
            "driver": _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"),
            "cuda": torch.version.cuda,
        }
    return found


def read_record(file: Path) -> Record:
    """A record from a file.

    Raises:
        ValueError: the file is none, or of another format.
    """
    record = json.loads(file.read_text())
    if not isinstance(record, Mapping) or record.get("format") != FORMAT:
        raise ValueError(f"{file}: not a benchmark record of format {FORMAT}")
    return dict(record)


def _first_block(file: Path) -> dict[str, str]:
    """The keys of the first processor in /proc/cpuinfo."""
    if not file.exists():
        return {}
    lines = file.read_text().split("\n\n")[0].splitlines()
    pairs = [line.partition(":") for line in lines]
    return {key.strip(): value.strip() for key, _, value in pairs}


@cache
def commit() -> str | None:
    """Commit of the checkout that the package lies in, with a plus if files were changed."""
    here = str(Path(__file__).parent)
    digits = _output("git", "-C", here, "rev-parse", "--short=12", "HEAD")
    if digits is None or _output("git", "-C", here, "ls-files", "--", __file__) in (None, ""):
        return None  # no checkout, or one that merely surrounds an installed package
    return digits + ("+" if _output("git", "-C", here, "status", "--porcelain", "-uno") else "")


def _output(*command: str) -> str | None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except OSError:
        return None
    return done.stdout.strip() if done.returncode == 0 else None
