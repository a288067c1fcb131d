"""The commands for a unified checkpoint that need no fusion: inspect, verify, drop, rename."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from condu.terminal import Debug, errors, printable

app = typer.Typer()

State = Annotated[Path, typer.Argument(metavar="STATE", help="Folder of a unified checkpoint.")]


@app.command("inspect")
def inspect_state(
    state: State,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print everything as one JSON object.")
    ] = False,
    debug: Debug = False,
) -> None:
    """Tasks with their rescalers, how dense masks are, sizes, and how far tasks agree.

    Mask %: bits that are set, of all parameters. Agreement of two tasks: bits that are set in both
    masks, of those that are set in either.
    """
    with errors("inspect", debug):
        from condu.checkpoint.inspecting import inspect
        from condu.checkpoint.inspection_tables import tables

        found = inspect(state)
        if as_json:
            print(json.dumps(found.as_dict(), indent=1))
            return
        console = Console()
        for table in tables(found):
            console.print(table)


@app.command("verify")
def verify_state(
    state: State,
    base: Annotated[
        str | None,
        typer.Option(metavar="BASE", help="Also compare this model with the recorded base."),
    ] = None,
    allow_pickle: Annotated[
        bool,
        typer.Option("--allow-pickle", help="Read a BASE of .bin or .pt files or a DCP folder."),
    ] = False,
    debug: Debug = False,
) -> None:
    """Read everything, and list all that is wrong: damaged files, values that make no sense.

    Ends with status 0 for a whole state, 1 if something is wrong with it or the base differs, and 2
    for what cannot be read at all.
    """
    with errors("verify", debug):
        from condu.checkpoint.verifying import verify

        faults = verify(state, base, allow_pickle=allow_pickle)
        for fault in faults:
            print(printable(fault))
        if faults:
            raise typer.Exit(1)
        print(f"{state}: whole" + ("" if base is None else f", and over {base}"))


@app.command("drop")
def drop_task(
    state: State,
    task: Annotated[str, typer.Argument(metavar="TASK", help="Task to forget.")],
    debug: Debug = False,
) -> None:
    """Forget a task. The unified delta and all other tasks stay as they are."""
    with errors("drop", debug):
        from condu.checkpoint.editing import drop

        drop(state, task)
        print(f"{state}: task {printable(task)} dropped")


@app.command("rename")
def rename_task(
    state: State,
    old: Annotated[str, typer.Argument(metavar="OLD", help="Name of a task.")],
    new: Annotated[str, typer.Argument(metavar="NEW", help="Its new name.")],
    debug: Debug = False,
) -> None:
    """Give a task another name."""
    with errors("rename", debug):
        from condu.checkpoint.editing import rename

        rename(state, old, new)
        print(f"{state}: task {printable(old)} is {printable(new)} now")
