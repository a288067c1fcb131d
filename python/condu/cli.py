"""The command `condu`: demo, run, bench, doctor, and the commands of the modules named
`*_commands`.

`bench` and `doctor` work with the core dependencies alone, so everything heavy is imported inside
the commands.
"""

from __future__ import annotations

import os
import platform
import sys
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from condu import (
    ablation_commands,
    adapter_commands,
    checkpoint_commands,
    data_commands,
    report_commands,
    state_commands,
    theory_commands,
)
from condu.terminal import EXTRA, Debug, complain, errors

if TYPE_CHECKING:
    from condu.config import RunConfig

app = typer.Typer(
    help="Continual learning of vision-language models by model fusion.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
app.add_typer(checkpoint_commands.app)
app.add_typer(state_commands.app)
app.add_typer(adapter_commands.app)
app.add_typer(data_commands.app)
app.add_typer(report_commands.app)
app.add_typer(ablation_commands.app)
app.add_typer(theory_commands.app)

Quiet = Annotated[bool, typer.Option("--quiet", help="Print the final table only.")]


def _print_version(wanted: bool) -> None:
    if wanted:
        print(f"condu {metadata.version('condu')}")
        raise typer.Exit


@app.callback()
def main(
    version: Annotated[
        bool,
        typer.Option("--version", help="Show the version.", callback=_print_version, is_eager=True),
    ] = False,
) -> None:
    pass


@app.command()
def demo(
    out: Annotated[
        Path | None, typer.Option(help="Run folder.", show_default="runs/demo, runs/demo-2, …")
    ] = None,
    tasks: Annotated[int | None, typer.Option(help="Only the first N tasks.")] = None,
    steps: Annotated[int | None, typer.Option(help="Training steps for each task.")] = None,
    seed: Annotated[int | None, typer.Option(help="Seed of the training.")] = None,
    every: Annotated[bool, typer.Option("--all", help="Every method that there is.")] = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """ConDU beside its baselines on the benchmark that comes with the package."""
    with errors("demo", debug):
        from condu.config import demo_config, make_config

        values = demo_config().model_dump()
        if every:
            from condu.methods import ALL

            values["methods"] = ALL
        options = {
            ("benchmark", "tasks"): tasks,
            ("training", "steps"): steps,
        }
        for (section, key), value in options.items():
            if value is not None:
                values[section][key] = value
        if steps is not None:
            values["lora"]["steps"] = steps
        if seed is not None:
            values["seed"] = seed
        _run(make_config(values, "demo"), out or _free(Path("runs", "demo")), quiet=quiet)


@app.command()
def run(
    config: Annotated[
        Path,
        typer.Argument(
            help="YAML file; each run leaves one as RUN/config.yaml. Those that come with the"
            " package are configs/mini.yaml (the demo), mini_vqa_pam.yaml, folders_condu.yaml, and"
            " of MTIL configs/mtil_condu_ft.yaml, mtil_condu_lora.yaml, both also ..._5shot.yaml,"
            " mtil_baselines.yaml, mtil_zscl.yaml, mtil_rail.yaml, mtil_xtail_rail_16shot.yaml."
        ),
    ],
    out: Annotated[
        Path | None, typer.Option(help="Run folder.", show_default="runs/<name of CONFIG>")
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on after a kill.")] = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Run what a configuration file describes."""
    with errors("run", debug):
        from condu.config import find_config, load_config

        loaded = load_config(find_config(config))
        _run(loaded, out or Path("runs", config.stem), resume=resume, quiet=quiet)


@app.command()
def bench(
    ops: Annotated[
        str | None,
        typer.Option(
            help="unify, absorb, absorb_, absorb_+check, decouple_, merge: some, by commas."
        ),
    ] = None,
    models: Annotated[
        str | None,
        typer.Option(help="tiny, ViT-B-16, ViT-L-14, ViT-bigG-14, Llama-2-7B: shapes, no weights."),
    ] = None,
    tasks: Annotated[str | None, typer.Option(help="Numbers of tasks, such as 2,8,16.")] = None,
    dtypes: Annotated[
        str, typer.Option(help="fp32, bf16, fp16 models; bf16/bf16: with a bfloat16 state.")
    ] = "fp32",
    device: Annotated[str | None, typer.Option(help="cpu or cuda.")] = None,
    repeats: Annotated[int | None, typer.Option(help="Timed calls of each operation.")] = None,
    baselines: Annotated[
        str | None, typer.Option(help="straightforward, eager, compile: pure PyTorch.")
    ] = None,
    no_baselines: Annotated[bool, typer.Option("--no-baselines", help="Kernels only.")] = False,
    quick: Annotated[
        bool, typer.Option("--quick", help="A tiny model, in seconds: does it work?")
    ] = False,
    out: Annotated[
        Path | None, typer.Option(help="Folder.", show_default="runs/bench, runs/bench-2, …")
    ] = None,
    debug: Debug = False,
) -> None:
    """How fast the kernels are here, beside a copy of memory and pure PyTorch."""
    with errors("bench", debug):
        from condu.bench.command import Options, measure, write, wrong_results
        from condu.bench.table import lines_of

        chosen = "" if no_baselines else baselines
        options = Options(ops, models, tasks, dtypes, device, repeats, chosen, quick)
        folder = out or _free(Path("runs", "bench"))
        record = measure(options, lambda line: print(line, flush=True), folder)
        print("", *lines_of(record), "", sep="\n")
        for line in write(record, folder):
            print(line)
        if wrong := wrong_results(record):
            for line in wrong:
                print(f"error: {line}", file=sys.stderr)
            raise typer.Exit(1)


@app.command()
def doctor() -> None:
    """What is installed, how the kernels were built, and which devices there are."""
    import torch

    import condu_ext

    table = Table(title="condu", show_header=False)
    facts: dict[str, Any] = {"python": platform.python_version(), "torch": torch.__version__}
    facts |= {f"condu_ext: {key}": value for key, value in condu_ext.build_info().items()}
    facts["CPU"] = f"{os.cpu_count()} cores, torch uses {torch.get_num_threads()}"
    for index in range(torch.cuda.device_count()):
        device = torch.cuda.get_device_properties(index)
        facts[f"GPU {index}"] = f"{device.name}, {device.total_memory / 2**30:.0f} GiB"
    if not torch.cuda.is_available():
        facts["GPU"] = "none that torch can use"
    facts |= {name: _version(name) for name in EXTRA.values()}
    for name, value in facts.items():
        table.add_row(name, escape(str(value)))
    Console().print(table)


def _run(config: RunConfig, out: Path, *, resume: bool = False, quiet: bool) -> None:
    from condu.progress import RunProgress
    from condu.report import misalignment, summary_tables
    from condu.trainer import ContinualTrainer

    # under a launcher several processes run this command: one of them talks
    console = Console(quiet=os.environ.get("RANK", "0") != "0")
    progress = RunProgress(console, quiet=quiet)
    trainer = ContinualTrainer.from_config(config, out, progress=progress)
    progress.line(f"run folder: {out}")
    try:
        results = trainer.run(resume=resume)
    except KeyboardInterrupt:
        complain(f"interrupted; to go on: condu run {out / 'config.yaml'} --out {out} --resume")
        raise typer.Exit(130) from None
    for table in summary_tables(results):
        console.print(table)
    if line := misalignment(results):
        console.print(line, highlight=False)
    progress.line(
        f"numbers: {out / 'results.json'}; tables and pictures: condu report {out}; "
        f"a page: condu report {out} -o report.html"
    )


def _free(folder: Path) -> Path:
    """`folder`, or the first of folder-2, folder-3, … that does not exist."""
    number, free = 1, folder
    while free.exists():
        number += 1
        free = folder.with_name(f"{folder.name}-{number}")
    return free


def _version(distribution: str) -> str:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return 'not installed (comes with "condu\\[train]")'


if __name__ == "__main__":
    app()
