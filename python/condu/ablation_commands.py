"""The command `condu ablate`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from condu.terminal import Debug, complain, errors

app = typer.Typer()


@app.command()
def ablate(
    folder: Annotated[
        Path,
        typer.Argument(
            metavar="RUN",
            help="Folder of a run of a CLIP, with individual, condu, emr, dpeclip_id or"
            " task_arithmetic.",
        ),
    ],
    out: Annotated[
        Path | None,
        typer.Option(
            "--out",
            "-o",
            help="Folder of the results; the same one again goes on where an interrupted call was.",
            show_default="RUN/ablation",
        ),
    ] = None,
    last: Annotated[
        bool,
        typer.Option("--last", help="Evaluate after the last task only: no Transfer, no Average."),
    ] = False,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print everything as one JSON object.")
    ] = False,
    quiet: Annotated[bool, typer.Option("--quiet", help="Print the final table only.")] = False,
    debug: Debug = False,
) -> None:
    """What each part of ConDU is worth: fuse and vote again with one thing changed at a time.

    Nothing is trained: the fine-tuned models that RUN left are fused anew. Writes ablation.json and
    the table as ablation.md.
    """
    with errors("ablate", debug):
        from condu.ablation import ablate
        from condu.ablation.tables import table, ties
        from condu.progress import RunProgress

        console = Console()
        place = out or folder / "ablation"
        if place.exists() and not place.is_dir():  # before hours of work
            raise NotADirectoryError(f"--out: {place} is not a folder")
        progress = RunProgress(console, quiet=quiet or as_json)
        try:
            results = ablate(folder, last=last, out=place, progress=progress)
        except KeyboardInterrupt:
            options = (f" --out {out}" if out else "") + (" --last" if last else "")
            complain(f"interrupted; to go on: condu ablate {folder}{options}")
            raise typer.Exit(130) from None
        if as_json:
            print(json.dumps(results, indent=1, allow_nan=False))
            return
        console.print(table(results))
        console.print(ties(results), highlight=False)
        if not quiet:
            console.print(f"results: {place}", highlight=False, markup=False, soft_wrap=True)
