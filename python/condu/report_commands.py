"""The command `condu report`: finished runs as tables, pictures and one HTML page."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from condu.terminal import Debug, errors

app = typer.Typer()


@app.command()
def report(
    folders: Annotated[
        list[Path],
        typer.Argument(metavar="RUN", help="Folders of finished runs over the same tasks."),
    ],
    out: Annotated[
        Path | None,
        typer.Option("--out", "-o", help="Write one self-contained HTML page about all of them."),
    ] = None,
    debug: Debug = False,
) -> None:
    """What finished runs found: with -o one HTML page; without, tables, and of a single run
    pictures in RUN/report.

    Runs that differ in nothing but the seed are shown together: mean, least, greatest.
    """
    with errors("report", debug):
        if out is not None:
            from condu.report.page import write_page

            write_page(folders, out)
            print(out)
        elif len(folders) == 1:
            _show(folders[0])
        else:
            _compare(folders)


def _show(folder: Path) -> None:
    from condu.report import matrix_table, misalignment, summary_tables
    from condu.report.plots import save_plots
    from condu.runfolder import RunFolder

    console = Console()
    results = RunFolder(folder).load_results()
    pictures = save_plots(results, folder / "report")  # first, for `| head` ends the printing
    for table in summary_tables(results):
        console.print(table)
    if line := misalignment(results):
        console.print(line, highlight=False)
    for name, method in results["methods"].items():
        for protocol in method["protocols"]:
            console.print(matrix_table(results, name, protocol))
    for file in pictures:
        console.print(str(file), highlight=False, soft_wrap=True)


def _compare(folders: list[Path]) -> None:
    from condu.report.comparison_tables import comparison_tables, legend
    from condu.report.gathering import gather

    console = Console()
    experiments = gather(folders)
    for table in comparison_tables(experiments):
        console.print(table)
    for line in legend(experiments):
        console.print(line, highlight=False, markup=False, soft_wrap=True)
