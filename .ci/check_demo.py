"""Checks every file that a demo run leaves behind: results, states, prototypes, plots."""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path

import condu_ext as cx
from condu.config import demo_config
from condu.metrics import summarize
from condu.prototypes import PrototypeSet
from condu.report.tables import protocols_of


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run", type=Path)
    parser.add_argument("--tasks", type=int, required=True)
    arguments = parser.parse_args()
    run: Path = arguments.run

    results = json.loads((run / "results.json").read_text())
    tasks = results["tasks"]
    assert len(tasks) == arguments.tasks, tasks
    assert list(results["methods"]) == list(demo_config().methods)
    merging = {name for name, entry in results["methods"].items() if "misaligned" in entry}
    assert merging == {"lora_average", "pam"}, merging
    for method, entry in results["methods"].items():
        assert set(entry["seconds"]) == {"train", "fuse", "evaluate"}, (method, entry["seconds"])
        assert all(s >= 0 for s in entry["seconds"].values()), (method, entry["seconds"])
        protocols = dict(protocols_of(entry))
        assert "task-id" in protocols, (method, list(protocols))
        for protocol, row in protocols.items():
            assert len(row["matrix"]) == len(tasks), (method, protocol)
            summary = summarize(row["matrix"])
            for metric in ("transfer", "average", "last"):
                assert math.isclose(row[metric], getattr(summary, metric)), (method, protocol)

    for method in ("condu", "condu_lora"):
        state = cx.UnifiedDelta.load(run / method / "state")
        assert list(state.tasks) == tasks
        assert all(0 < state.rescaler(task) < math.inf for task in tasks)
    prototypes = PrototypeSet.load(run / "prototypes.safetensors")
    assert list(prototypes.tasks) == tasks
    plots = sorted((run / "report").glob("*.png"))
    assert len(plots) >= len(results["methods"]) + 1, plots
    assert all(plot.read_bytes().startswith(b"\x89PNG") for plot in plots)
    print(f"{run}: {len(plots)} plots and every other file are as they should be")


if __name__ == "__main__":
    main()
