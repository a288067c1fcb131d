"""Checks every file that a demo run leaves behind: results, states, prototypes, plots."""

from __future__ import annotations

import argparse
import math
from pathlib import Path

import condu_ext as cx
from condu.config import demo_config
from condu.metrics import summarize
from condu.prototypes import PrototypeSet
from condu.runfolder import RunFolder
from condu.weights import load_weights


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run", type=Path)
    parser.add_argument("--tasks", type=int, required=True)
    arguments = parser.parse_args()
    run: Path = arguments.run

    results = RunFolder(run).load_results()
    tasks = results["tasks"]
    assert len(tasks) == arguments.tasks, tasks
    assert list(results["methods"]) == list(demo_config().methods)
    assert list(results["classes"]) == tasks
    for key, expected in (
        ("misaligned", {"lora_average", "pam"}),
        ("fused", {"condu", "condu_lora"}),
    ):
        methods = results["methods"].items()
        given = {name for name, entry in methods if entry["sessions"][-1][key] is not None}
        assert given == expected, (key, given)
    for method, entry in results["methods"].items():
        assert set(entry["seconds"]) == {"train", "fuse", "evaluate"}, (method, entry["seconds"])
        assert all(s >= 0 for s in entry["seconds"].values()), (method, entry["seconds"])
        assert len(entry["sessions"]) == len(tasks), method
        protocols = entry["protocols"]
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
    features = load_weights(run / "features.safetensors")
    assert len(features) == 2 * len(tasks), sorted(features)
    assert all(len(features[f"{i}.labels"]) == 100 for i in range(len(tasks)))
    plots = sorted((run / "report").glob("*.png"))
    assert len(plots) >= len(results["methods"]) + 1, plots
    assert all(plot.read_bytes().startswith(b"\x89PNG") for plot in plots)
    page = (run / "report.html").read_text(encoding="utf-8")
    assert page.rstrip().endswith("</html>")
    assert all(name in page for name in (*tasks, *results["methods"]))
    print(f"{run}: {len(plots)} plots and every other file are as they should be")


if __name__ == "__main__":
    main()
