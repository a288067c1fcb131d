"""The command `condu theory`: the paper's theorems, looked at on real and on random deltas."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from condu.terminal import Debug, complain, errors

app = typer.Typer()


@app.command("theory")
def check_theory(
    runs: Annotated[
        list[Path] | None,
        typer.Argument(
            metavar="[RUN]...",
            help="Runs that differ in the seed alone: their fine-tuned models are used first.",
        ),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(
            "--out",
            "-o",
            help="Folder of the results and of further fine-tuned models; the same one again goes"
            " on where a killed call was.",
            show_default="RUN/theory, or runs/theory",
        ),
    ] = None,
    tasks: Annotated[
        int | None,
        typer.Option(
            help="Number of deltas; where RUN has fewer models, further ones are fine-tuned.",
            show_default="all that RUN has; without RUN 50",
        ),
    ] = None,
    steps: Annotated[
        int | None,
        typer.Option(help="Training steps for each, without RUN.", show_default="the demo's"),
    ] = None,
    iterations: Annotated[int, typer.Option(help="Repetitions, at most.")] = 5000,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print everything as one JSON object.")
    ] = False,
    debug: Debug = False,
) -> None:
    """Do the theorems hold? Theorems F.3 and F.5 and Corollary F.6 of the ConDU paper, measured.

    On deltas of fine-tuned models, those of RUN or else of the embedded benchmark, one seed after
    another, and on random ones of the same scale. Leaves theory.json and three pictures in the
    folder.
    """
    with errors("theory", debug):
        from condu.config import demo_config, make_config
        from condu.progress import RunProgress
        from condu.runfolder import RunFolder, write_text
        from condu.theory.finetunings import FineTunings, fine_tuning_of, fine_tuning_of_runs
        from condu.theory.plots import save_plots
        from condu.theory.study import study
        from condu.theory.tables import tables
        from condu.trainer import ContinualTrainer

        values = demo_config().model_dump()
        if steps is not None:
            if runs:
                raise ValueError(f"--steps {steps}: the steps are those of {runs[0]}")
            values["training"]["steps"] = steps
        if runs:
            config, by_seed = fine_tuning_of_runs(runs)
        else:
            config, by_seed = fine_tuning_of(make_config(values, "theory")), {}
        folder = out or (runs[0] if runs else Path("runs")) / "theory"
        console = Console()
        progress = RunProgress(Console(stderr=as_json))  # stdout is JSON's then
        trainer = ContinualTrainer.from_config(config, folder)
        basis = trainer.basis()
        for run in runs or ():
            RunFolder(run).load_progress(basis)
        fine_tunings = FineTunings(
            trainer.live, trainer.benchmark, config, by_seed, folder, progress
        )
        try:
            number = (fine_tunings.of_runs or 50) if tasks is None else tasks
            record = study(fine_tunings, number, iterations)
        except KeyboardInterrupt:
            complain(f"interrupted; the same call with --out {folder} goes on")
            raise typer.Exit(130) from None
        text = json.dumps(record, indent=1, allow_nan=False)
        write_text(folder / "theory.json", text)
        pictures = save_plots(record, folder)
        if as_json:
            print(text)
            return
        for table in tables(record):
            console.print(table)
        for file in (folder / "theory.json", *pictures):
            console.print(str(file), highlight=False, soft_wrap=True)
