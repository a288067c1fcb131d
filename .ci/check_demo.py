"""Checks every file that a demo run leaves behind: results, states, prototypes, plots."""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path

import condu_ext as cx
from condu.metrics import summarize
from condu.prototypes import PrototypeSet


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run", type=Path)
    parser.add_argument("--tasks", type=int, required=True)
    arguments = parser.parse_args()
    run: Path = arguments.run

    results = json.loads((run / "results.json").read_text())
    tasks = results["tasks"]
    assert len(tasks) == arguments.tasks, tasks
    assert {"zero_shot", "individual", "sequential", "condu"} <= set(results["methods"])
    for method, entry in results["methods"].items():
        assert set(entry["seconds"]) == {"train", "fuse", "evaluate"}, (method, entry["seconds"])
        assert all(s >= 0 for s in entry["seconds"].values()), (method, entry["seconds"])
        protocols = [name for name in entry if name != "seconds"]
        assert "task-id" in protocols, (method, protocols)
        for protocol in protocols:
            row = entry[protocol]
            assert len(row["matrix"]) == len(tasks), (method, protocol)
            summary = summarize(row["matrix"])
            for metric in ("transfer", "average", "last"):
                assert math.isclose(row[metric], getattr(summary, metric)), (method, protocol)

    state = cx.UnifiedDelta.load(run / "condu" / "state")
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
