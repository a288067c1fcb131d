from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from rich.console import Console
from rich.table import Table

from condu.report import matrix_table, misalignment, summary_tables
from condu.report.plots import save_plots
from condu.report.tables import SUMMARY, percent


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
    (table,) = summary_tables(results())
    lines = printed(table)
    cells = {line.split()[0]: line.split()[1:] for line in lines if "12.3" in line}
    assert cells == {
        "individual_lora": ["10.0", "11.0", "12.0", "-10.0", "–", "–", "12.3", "0"],
        "two": ["30.1", "31.1", "32.1", "-30.1", "51.0", "52.0", "12.3", "12"],
    }
    assert "Transfer  Average  Last" in " ".join(lines)  # not cut
    assert any("tiny: 2 tasks, seed 7" in line for line in lines)


def evaluated_with(*protocols: str) -> dict[str, Any]:
    """`two` with each of the protocols, higher by ten each time; the other with the first."""
    found = results()
    methods = found["methods"]
    tables = [results()["methods"]["two"]["protocols"]["task-id"] for _ in protocols]
    for place, table in enumerate(tables):
        table.update({metric: 10.0 * place + n for n, metric in enumerate(SUMMARY)})
    methods["two"]["protocols"] = dict(zip(protocols, tables, strict=True))
    methods["individual_lora"]["protocols"] = {protocols[0]: tables[0]}
    return found


def cells(table: Table, method: str) -> list[str]:
    return next(line.split()[1:] for line in printed(table) if line.split()[:1] == [method])


def test_a_union_of_classes_has_a_summary_of_its_own() -> None:
    known, seen, all_of_them = summary_tables(
        evaluated_with("task-id", "agnostic", "union-odcl-cil", "union-x-tail")
    )
    assert cells(known, "two") == ["0.0", "1.0", "2.0", "3.0", "11.0", "12.0", "12.3", "12"]
    assert cells(seen, "two") == ["20.0", "21.0", "22.0", "23.0"]
    assert cells(all_of_them, "two") == ["30.0", "31.0", "32.0", "33.0"]
    titles = [[line.strip() for line in printed(table)[:2]] for table in (known, seen, all_of_them)]
    assert titles == [
        ["tiny: 2 tasks, seed 7", f"protocol{which}"]
        for which in ("s task-id and agnostic", " union-odcl-cil", " union-x-tail")
    ]
    assert not any("individual_lora" in line for line in printed(seen))


@pytest.mark.parametrize("protocol", ["task-id", "agnostic", "union-odcl-cil", "union-x-tail"])
def test_the_summary_of_one_protocol_has_no_gaps(protocol: str) -> None:
    (table,) = summary_tables(evaluated_with(protocol))
    for method, costs in (("individual_lora", ["12.3", "0"]), ("two", ["12.3", "12"])):
        assert cells(table, method) == ["0.0", "1.0", "2.0", "3.0", *costs]


def test_misalignment_is_the_mean_over_tasks_and_only_of_methods_that_merge() -> None:
    line = misalignment(results(3))
    assert line is not None
    assert line.endswith("before merging: two 18.8 %")
    without = results()
    del without["methods"]["two"]
    assert misalignment(without) is None


def test_what_one_task_leaves_undefined_is_a_dash() -> None:
    (table,) = summary_tables(results(1))
    line = next(line for line in printed(table) if "individual_lora" in line)
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


@pytest.mark.filterwarnings("error")
def test_names_of_tasks_are_no_mathematics_and_may_be_of_any_script(tmp_path: Path) -> None:
    found = results(3) | {"tasks": ["costs_$5_to_$10", "한국어", "a\x07b\n"]}
    assert all(file.stat().st_size > 0 for file in save_plots(found, tmp_path))


def test_the_pictures_show_the_numbers(tmp_path: Path) -> None:
    low, high = results(), results()
    high["methods"]["individual_lora"]["protocols"]["task-id"]["matrix"][0][0] = 90.0
    save_plots(low, tmp_path / "low")
    save_plots(high, tmp_path / "high")
    name = "accuracy-individual_lora-task-id.png"
    assert (tmp_path / "low" / name).read_bytes() != (tmp_path / "high" / name).read_bytes()
    name = "accuracy-two-task-id.png"
    assert (tmp_path / "low" / name).read_bytes() == (tmp_path / "high" / name).read_bytes()
