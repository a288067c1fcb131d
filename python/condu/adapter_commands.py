"""The commands for adapters on disk: absorb-adapter, extract-adapter."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from condu.terminal import Debug, errors

app = typer.Typer()

State = Annotated[Path, typer.Argument(metavar="STATE", help="Folder of a unified checkpoint.")]
Init = Annotated[
    Path | None,
    typer.Option(
        metavar="ADAPTER_DIR", help="The adapter as saved before training: the space of factors."
    ),
]


@app.command("absorb-adapter")
def absorb(
    state: State,
    adapter: Annotated[
        Path, typer.Argument(metavar="ADAPTER_DIR", help="Folder that PEFT saved a LoRA in.")
    ],
    task: Annotated[str, typer.Option(help="Name of the adapter's task.")],
    init: Init = None,
    debug: Debug = False,
) -> None:
    """Absorb a saved LoRA adapter into a unified checkpoint, made if there is none."""
    with errors("absorb-adapter", debug):
        from condu.adapters import absorb_adapter

        new = absorb_adapter(state, adapter, task, init=init)
        space = "products" if init is None else "factors"
        tasks = ", ".join(new.tasks)
        print(f"{state}: task {task!r} absorbed in the space of {space}; tasks: {tasks}")


@app.command("extract-adapter")
def extract(
    state: State,
    task: Annotated[str, typer.Option(help="Name of the task.")],
    out: Annotated[
        Path, typer.Option("--out", "-o", metavar="ADAPTER_DIR", help="Folder to make.")
    ],
    init: Init = None,
    svd_rank: Annotated[
        int | None, typer.Option(help="Rank to cut to, for a state in the space of products.")
    ] = None,
    debug: Debug = False,
) -> None:
    """Write a task's expert as a LoRA adapter that PEFT loads.

    With --svd-rank, weights are taken for those of linear layers and attentions: a state of
    products does not say which are of embeddings or of transformers' Conv1D, for which the adapter
    would be wrong.
    """
    with errors("extract-adapter", debug):
        from condu.adapters import extract_adapter

        loss = extract_adapter(state, task, out, init=init, svd_rank=svd_rank)
        print(f"{out}: the expert of task {task!r}")
        if loss is not None:
            print("all weights are taken for those of linear layers and attentions")
            print(
                f"rank {svd_rank} leaves out {100 * loss.total:.3g} % of the energy,"
                f" {100 * loss.worst:.3g} % of {loss.worst_weight}, the worst"
            )
