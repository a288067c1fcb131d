from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from rich.console import Console

from condu.report import matrix_table, misalignment, summary_table
from condu.report.plots import save_plots
from condu.report.tables import percent


def results(tasks: int = 2) -> dict[str, Any]:
    """Two methods over `tasks` tasks; only the second has both protocols."""

    def table(value: float) -> dict[str, Any]:
        matrix = [[value + i + j for j in range(tasks)] for i in range(tasks)]
        transfer = None if tasks == 1 else value
        bwt = None if tasks == 1 else -value
        summary = {"transfer": transfer, "average": value + 1, "last": value + 2, "bwt": bwt}
        return {"matrix": matrix, **summary}

    return {
        "benchmark": "tiny",
        "seed": 7,
        "tasks": [f"task {i}" for i in range(tasks)],
        "methods": {
            "individual_lora": {
                "protocols": {"task-id": table(10.04)},
                "sessions": [{"misaligned": None}] * tasks,
                "seconds": {"train": 12.34, "fuse": 0.0, "evaluate": 1.0},
            },
            "two": {
                "protocols": {"task-id": table(30.06), "agnostic": table(50.0)},
                "sessions": [{"misaligned": share} for share in (None, 0.25, 0.125)[:tasks]],
                "seconds": {"train": 12.34, "fuse": 0.0123, "evaluate": 1.0},
            },
        },
    }


def printed(table: object) -> list[str]:
    console = Console(width=80, record=True, quiet=False, file=None)
    with console.capture() as capture:
        console.print(table)
    return capture.get().splitlines()


def test_the_summary_has_one_line_a_method_within_80_columns() -> None:
    lines = printed(summary_table(results()))
    cells = {line.split()[0]: line.split()[1:] for line in lines if "12.3" in line}
    assert cells == {
        "individual_lora": ["10.0", "11.0", "12.0", "-10.0", "–", "–", "12.3", "0"],
        "two": ["30.1", "31.1", "32.1", "-30.1", "51.0", "52.0", "12.3", "12"],
    }
    assert "Transfer  Average  Last" in " ".join(lines)  # not cut
    assert any("tiny: 2 tasks, seed 7" in line for line in lines)


def test_misalignment_is_the_mean_over_tasks_and_only_of_methods_that_merge() -> None:
    line = misalignment(results(3))
    assert line is not None
    assert line.endswith("before merging: two 18.8 %")
    without = results()
    del without["methods"]["two"]
    assert misalignment(without) is None


def test_what_one_task_leaves_undefined_is_a_dash() -> None:
    line = next(line for line in printed(summary_table(results(1))) if "individual_lora" in line)
    assert line.split()[1] == "–"


def test_a_zero_has_no_sign() -> None:
    assert [percent(value) for value in (-0.04, 0.04, -0.06, None)] == ["0.0", "0.0", "-0.1", "–"]


def test_names_of_tasks_are_no_markup() -> None:
    found = results(1) | {"tasks": ["[bold]a[/x]"]}
    assert any("[bold]a[/x]" in line for line in printed(matrix_table(found, "two", "agnostic")))


def test_the_matrix_table_has_a_row_for_each_task() -> None:
    lines = printed(matrix_table(results(3), "two", "agnostic"))
    rows = [line.split() for line in lines if re.match(" *task [012] .*[.]", line)]
    assert rows == [
        ["task", "0", "50.0", "51.0", "52.0"],
        ["task", "1", "51.0", "52.0", "53.0"],
        ["task", "2", "52.0", "53.0", "54.0"],
    ]


@pytest.mark.parametrize("tasks", [1, 3])
def test_one_picture_a_matrix_and_a_summary(tmp_path: Path, tasks: int) -> None:
    files = save_plots(results(tasks), tmp_path / "report")
    assert [file.name for file in files] == [
        "accuracy-individual_lora-task-id.png",
        "accuracy-two-task-id.png",
        "accuracy-two-agnostic.png",
        "summary.png",
    ]
    for file in files:
        with Image.open(file) as image:
            assert min(image.size) > 200
            assert len(image.convert("RGB").getcolors(1 << 24) or ()) > 50  # something is drawn


def test_the_pictures_show_the_numbers(tmp_path: Path) -> None:
    low, high = results(), results()
    high["methods"]["individual_lora"]["protocols"]["task-id"]["matrix"][0][0] = 90.0
    save_plots(low, tmp_path / "low")
    save_plots(high, tmp_path / "high")
    name = "accuracy-individual_lora-task-id.png"
    assert (tmp_path / "low" / name).read_bytes() != (tmp_path / "high" / name).read_bytes()
    name = "accuracy-two-task-id.png"
    assert (tmp_path / "low" / name).read_bytes() == (tmp_path / "high" / name).read_bytes()
