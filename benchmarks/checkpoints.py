"""Whole commands on checkpoints against plain reading and writing of the same bytes.

    python benchmarks/checkpoints.py SCRATCH --out benchmarks/results/DATE-checkpoints

Makes a base model of 535 M parameters and four fine-tunes of it in bfloat16, in SCRATCH (5.4 GB,
and 11 GB more while it runs), as folders that `save_pretrained` could have written: a Llama's
tensors in several shards with an index. Then, in every round and by turns, all with a warm page
cache:

- Python reads the command's inputs file by file and writes as many bytes as its result has;
- `cp` copies the inputs;
- the command itself, from the start of the interpreter to its end.

Files are removed and the disk is left to settle between two of them, untimed. Before it is timed,
every result is compared with condu_ext's on whole models in memory, bit for bit: unified delta,
masks, rescalers, and the extracted model.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from datetime import date
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import save_torch_state_dict
from safetensors.torch import load_file
from torch import Tensor

import condu_ext as cx
from condu.bench.cases import PRECISIONS
from condu.bench.inputs import Inputs
from condu.bench.record import commit, machine
from condu.bench.shapes import Llama, parameters
from timed_command import Finished, run

MODEL = Llama(width=1536, layers=16, hidden=3872, vocabulary=32000)
"""As small Llamas are shaped, with the number of parameters of the comparison's models."""
TASKS = ("a", "b", "c", "d")
SHARD = "300MB"
BLOCK = 8 << 20


# ---- the files -----------------------------------------------------------------------------------


def make_models(folder: Path) -> None:
    """The base and a fine-tune for each task, unless they are there."""
    inputs = Inputs(MODEL.shapes(), PRECISIONS["bf16"], torch.device("cpu"))
    for number, name in enumerate(("base", *TASKS)):
        target = folder / name
        if (target / "config.json").exists():
            continue
        target.mkdir(parents=True, exist_ok=True)
        model = inputs.pretrained if name == "base" else inputs.newcomer(number)
        save_torch_state_dict(model, target, max_shard_size=SHARD, metadata={"format": "pt"})
        (target / "config.json").write_text(json.dumps({"model_type": "llama"}) + "\n")


def load(folder: Path) -> dict[str, Tensor]:
    """A model in memory."""
    parts = [load_file(file) for file in sorted(folder.glob("*.safetensors"))]
    return {name: tensor for part in parts for name, tensor in part.items()}


def files_of(*folders: Path) -> list[Path]:
    return [file for folder in folders for file in sorted(folder.glob("*.safetensors"))]


def size_of(files: list[Path]) -> int:
    return sum(file.stat().st_size for file in files)


# ---- what is timed -------------------------------------------------------------------------------


def plain(inputs: list[Path], size: int, target: Path) -> tuple[float, float]:
    """Seconds to read all inputs and to write ``size`` bytes, in one thread."""
    buffer = memoryview(bytearray(BLOCK))
    begin = time.perf_counter()
    for file in inputs:
        with open(file, "rb", buffering=0) as stream:
            while stream.readinto(buffer):
                pass
    middle = time.perf_counter()
    target.mkdir()
    with open(target / "bytes", "wb", buffering=0) as stream:
        for start in range(0, size, BLOCK):
            stream.write(buffer[: min(BLOCK, size - start)])
    return middle - begin, time.perf_counter() - middle


def copied(inputs: list[Path], target: Path) -> float:
    """Seconds of `cp`."""
    target.mkdir()
    names = [str(file) for file in inputs]
    begin = time.perf_counter()
    subprocess.run(["cp", "--reflink=never", "--backup=numbered", *names, str(target)], check=True)
    return time.perf_counter() - begin


@dataclass(frozen=True)
class Command:
    """One command of condu: its arguments without the target, the files that it reads, and what
    its result must equal."""

    name: str
    arguments: list[str]
    reads: list[Path]
    check: Callable[[Path], None]

    def run(self, target: Path, processes: int) -> Finished:
        return run(*self.arguments, "--out", str(target), processes=processes)


def commands(folder: Path) -> Iterator[Command]:
    """Unify four models; absorb the fourth into a state of three; extract one of four."""
    base, finetuned = folder / "base", {task: folder / task for task in TASKS}
    given = [part for t, path in finetuned.items() for part in ("--task", f"{t}={path}")]
    small, large = folder / "state-3", folder / "state-4"

    def same_state(expected: Callable[[], cx.UnifiedDelta]) -> Callable[[Path], None]:
        return lambda target: check_state(cx.UnifiedDelta.load(target), expected())

    def unified() -> cx.UnifiedDelta:
        return cx.unify({t: load(path) for t, path in finetuned.items()}, load(base))

    def absorbed() -> cx.UnifiedDelta:
        return cx.absorb(cx.UnifiedDelta.load(small), "d", load(finetuned["d"]), load(base))

    def expert(target: Path) -> None:
        theta = cx.decouple(cx.UnifiedDelta.load(large), "b", load(base))
        check_tensors("expert", load(target), theta)

    for state, tasks in ((small, given[:-2]), (large, given)):
        if not (state / "config.json").exists():
            run("unify", str(base), *tasks, "--out", str(state))
    start = ["--base", str(base), "--task"]
    reads = files_of(base, *finetuned.values())
    yield Command("unify", ["unify", str(base), *given], reads, same_state(unified))
    reads = files_of(small, base, finetuned["d"])
    arguments = ["absorb", str(small), *start, f"d={finetuned['d']}"]
    yield Command("absorb", arguments, reads, same_state(absorbed))
    others = [f"triggers-1-{number}-" for number, task in enumerate(TASKS) if task != "b"]
    reads = [f for f in files_of(large, base) if not f.name.startswith(tuple(others))]
    yield Command("extract", ["extract", str(large), *start, "b"], reads, expert)


def check_tensors(what: str, found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    for name, tensor in expected.items():
        if not torch.equal(found[name].view(torch.uint8), tensor.view(torch.uint8)):
            raise SystemExit(f"{what}: tensor {name} is not what condu_ext computes in memory")


def check_state(found: cx.UnifiedDelta, expected: cx.UnifiedDelta) -> None:
    check_tensors("unified delta", dict(found.delta), dict(expected.delta))
    for task in expected.tasks:
        mine, theirs = found.packed_mask(task), expected.packed_mask(task)
        check_tensors(f"mask of {task}", dict(mine), dict(theirs))
        if found.rescaler(task) != expected.rescaler(task):
            raise SystemExit(f"rescaler of {task}: {found.rescaler(task)} in the checkpoint")


# ---- rounds --------------------------------------------------------------------------------------


def settle(target: Path) -> None:
    """Forget what was written, so that nobody pays for what another left."""
    shutil.rmtree(target, ignore_errors=True)
    os.sync()


def measure(command: Command, target: Path, rounds: int, processes: int) -> dict[str, Any]:
    """One command in several rounds; sizes in bytes, times in seconds.

    Shares are rates of bytes read and written, of the whole command apart from its fsync, and of
    its ``streaming`` alone (reading, fusing and writing, without the start of the interpreter).
    """
    inputs = command.reads
    settle(target)
    command.run(target, processes)
    command.check(target)
    read, written = size_of(inputs), size_of(files_of(target))
    found: list[dict[str, Any]] = []
    for _ in range(rounds):
        settle(target)
        reading, writing = plain(inputs, written, target)
        settle(target)
        copy = copied(inputs, target)
        settle(target)
        took = command.run(target, processes)
        settle(target)
        times = {"whole": took.apart_from_fsync, "streaming": took.summary["elapsed"]}
        cp_rate = 2 * read / copy
        found.append(
            {
                "load": os.getloadavg()[0],
                "command": asdict(took) | {"apart_from_fsync": took.apart_from_fsync},
                "plain": {"read": reading, "write": writing},
                "cp": copy,
                "share_of_plain": {k: (reading + writing) / t for k, t in times.items()},
                "share_of_cp": {k: (read + written) / t / cp_rate for k, t in times.items()},
            }
        )
        print(command.name, json.dumps(found[-1]), flush=True)
    return {
        "command": command.name,
        "processes": processes,
        "bytes_read": read,
        "bytes_written": written,
        "medians": medians(found),
        "rounds": found,
    }


def medians(rounds: list[dict[str, Any]]) -> dict[str, Any]:
    """The median of every number, wherever it stands in the rounds' records."""
    found: dict[str, Any] = {}
    for key, value in rounds[0].items():
        values = [r[key] for r in rounds]
        if value is not None:
            found[key] = medians(values) if isinstance(value, dict) else statistics.median(values)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("scratch", type=Path, help="folder for 16 GB of files")
    parser.add_argument("--out", type=Path, required=True, help="folder for the record")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--processes", type=int, default=1)
    options = parser.parse_args()
    make_models(options.scratch)
    record = {
        "date": date.today().isoformat(),
        "commit": commit(),
        "machine": machine(torch.device("cpu")),
        "model": asdict(MODEL) | {"parameters": parameters(MODEL.shapes())},
        "commands": [],
    }
    options.out.mkdir(parents=True, exist_ok=True)
    for command in commands(options.scratch):
        record["commands"].append(
            measure(command, options.scratch / "target", options.rounds, options.processes)
        )
        suffix = "" if options.processes == 1 else f"-{options.processes}-processes"
        file = options.out / f"checkpoints{suffix}.json"
        file.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
