"""The command `condu ablate`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from condu.terminal import Debug, errors

app = typer.Typer()


@app.command()
def ablate(
    folder: Annotated[
        Path,
        typer.Argument(
            metavar="RUN", help="Folder of a run with the method condu or individual, for a CLIP."
        ),
    ],
    out: Annotated[
        Path | None,
        typer.Option("--out", "-o", help="Folder of the results.", show_default="RUN/ablation"),
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
        from condu.ablation.tables import markdown, table, ties
        from condu.progress import RunProgress
        from condu.runfolder import write_text

        console = Console()
        place = out or folder / "ablation"
        if place.exists() and not place.is_dir():  # before hours of work
            raise NotADirectoryError(f"--out: {place} is not a folder")
        results = ablate(folder, last=last, progress=RunProgress(console, quiet=quiet or as_json))
        text = json.dumps(results, indent=1, allow_nan=False)
        place.mkdir(parents=True, exist_ok=True)
        write_text(place / "ablation.json", text)
        write_text(place / "ablation.md", markdown(results))
        if as_json:
            print(text)
            return
        console.print(table(results))
        console.print(ties(results), highlight=False)
        if not quiet:
            console.print(f"results: {place}", highlight=False, markup=False, soft_wrap=True)
