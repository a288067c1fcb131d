"""The command `condu data`: what benchmarks on disk need."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.table import Table

from condu.terminal import Debug, errors

if TYPE_CHECKING:
    from condu.tasks.finding import Finding

SIZES = ("classes", "train", "test")

app = typer.Typer()
data = typer.Typer(help="Data sets of benchmarks on disk.", no_args_is_help=True)
app.add_typer(data, name="data")


@data.command("check")
def check_data(
    root: Annotated[Path, typer.Argument(help="Folder that holds the data sets.")],
    benchmark: Annotated[str, typer.Option(help="mtil or folders.")] = "mtil",
    as_json: Annotated[
        bool, typer.Option("--json", help="Print everything as one JSON object.")
    ] = False,
    debug: Debug = False,
) -> None:
    """Which data sets are found, whether sizes and classes are right, and what goes where.

    Ends with status 0 if all is there, 1 if something is missing or wrong.
    """
    with errors("data check", debug):
        folder = root.expanduser()
        if not folder.is_dir():
            raise NotADirectoryError(f"{folder} is not a folder")
        findings = _look(benchmark, folder)
        complete = all(finding.state == "complete" for finding in findings)
        if as_json:
            facts = {"benchmark": benchmark, "root": str(folder), "complete": complete}
            datasets = [asdict(finding) for finding in findings]
            print(json.dumps({**facts, "datasets": datasets}, indent=1))
        else:
            _print(benchmark, findings)
            if benchmark == "mtil" and any(folder.glob("*/train/*")):
                print("\ntasks of your own, a folder for each? that is --benchmark folders")
        if not complete:
            raise typer.Exit(1)


def _look(benchmark: str, folder: Path) -> list[Finding]:
    if benchmark == "mtil":
        from condu.tasks.mtil.check import check

        return check(folder)
    if benchmark == "folders":
        from condu.tasks.folders import check_folders

        return check_folders(folder)
    raise ValueError(f"--benchmark: must be mtil or folders, got {benchmark!r}")


def _print(benchmark: str, findings: list[Finding]) -> None:
    console = Console()
    console.print(_table(benchmark, findings))
    for line in _advice(findings):
        console.print(line, highlight=False, markup=False, soft_wrap=True)


def _advice(findings: list[Finding]) -> Iterator[str]:
    """What is wrong with each data set and how to put it right."""
    for finding in findings:
        if finding.state == "complete":
            continue
        yield ""
        for problem in finding.problems:
            yield f"{finding.name}: {problem.removeprefix(f'{finding.name}: ')}"
        yield f"  {finding.how}"
    fetched = [f.name for f in findings if f.state == "missing" and f.downloads]
    if fetched:
        yield ""
        yield f"`download: true` in the section `benchmark` of a run fetches: {', '.join(fetched)}"


def _table(title: str, findings: list[Finding]) -> Table:
    from condu.report.tables import NARROW, UNDEFINED

    expects = any(finding.expected for finding in findings)
    table = Table(title=title, caption="found / expected" if expects else None, **NARROW)
    table.add_column("data set", no_wrap=True)
    for column in ("classes", "training", "test"):
        table.add_column(column, justify="right")
    table.add_column("state")
    for finding in findings:
        found = asdict(finding.found) if finding.found else dict.fromkeys(SIZES, UNDEFINED)
        expected = asdict(finding.expected) if finding.expected else {}
        cells = (f"{found[k]} / {expected[k]}" if expected else str(found[k]) for k in SIZES)
        table.add_row(finding.name, *cells, finding.state)
    return table
