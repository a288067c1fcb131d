"""The commands that fuse checkpoints: unify, absorb, merge, extract, and plan for each of them."""

from __future__ import annotations

import inspect
import os
import re
import warnings
from collections.abc import Callable
from dataclasses import replace
from functools import wraps
from typing import Annotated, Any

import typer

from condu.terminal import Debug, complain, errors

app = typer.Typer()
plan_app = typer.Typer(no_args_is_help=True)
app.add_typer(
    plan_app, name="plan", help="What one of these commands would read, write and take: a dry run."
)

_UNITS = {"": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30, "T": 1 << 40}

# paths as text, for Path takes an empty one, as of a variable that is not set, as "."
State = Annotated[str, typer.Argument(metavar="STATE", help="Folder of a unified checkpoint.")]
Base = Annotated[str, typer.Option(help="The pretrained model: folder, file, or hub id.")]
Out = Annotated[
    str, typer.Option("--out", "-o", metavar="STATE", help="Folder of the new unified checkpoint.")
]


def _options(
    max_memory: Annotated[
        str, typer.Option(help="Memory of the whole process, such as 2G or 500M.")
    ] = "2G",
    device: Annotated[str, typer.Option(help="Where ranges are fused: cpu or cuda.")] = "cpu",
    match_dtype: Annotated[
        bool,
        typer.Option("--match-dtype", help="Round the base first to a narrower fine-tune's dtype."),
    ] = False,
    on_mismatch: Annotated[
        str,
        typer.Option(
            help="error, or skip: tensors that are missing, extra, or of another shape count as "
            "not fine-tuned."
        ),
    ] = "error",
    allow_pickle: Annotated[
        bool,
        typer.Option("--allow-pickle", help="Read .bin and .pt files and DCP folders as well."),
    ] = False,
    quiet: Annotated[bool, typer.Option("--quiet", help="No progress bar, no summary.")] = False,
    debug: Debug = False,
) -> None:
    """The options of all commands; see :class:`condu.checkpoint.Options`."""


def _command(name: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Registers a function that prepares a command, twice: to run it, and to plan it."""

    def register(prepare: Callable[..., Any]) -> Callable[..., Any]:
        own = inspect.signature(prepare, eval_str=True).parameters
        common = inspect.signature(_options, eval_str=True).parameters
        given = [p for p in own.values() if p.name != "options"]
        parameters = sorted([*given, *common.values()], key=lambda p: p.default is not p.empty)

        def command(act: Callable[[Any, bool], None], command: str) -> Callable[..., None]:
            @wraps(prepare)
            def run(**values: Any) -> None:
                chosen = {key: values.pop(key) for key in common}
                with errors(command, chosen["debug"]):
                    _run(prepare, values, chosen, act)

            run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
            run.__annotations__ = {p.name: p.annotation for p in parameters}
            return run

        app.command(name)(command(_do, name))
        plan_app.command(name)(command(_plan, f"plan {name}"))
        return prepare

    return register


def _run(
    prepare: Callable[..., Any],
    values: dict[str, Any],
    chosen: dict[str, Any],
    act: Callable[[Any, bool], None],
) -> None:
    from condu.checkpoint.options import Options
    from condu.checkpoint.world import World, launched

    with launched(lambda line: complain(line, kind="note")):
        talks = World.current().leads

        def report(line: str) -> None:
            if talks:
                complain(line, kind="note")

        options = Options(
            max_memory=_bytes(chosen["max_memory"]),
            device=_device(chosen["device"]),
            match_dtype=chosen["match_dtype"],
            on_mismatch=chosen["on_mismatch"],
            allow_pickle=chosen["allow_pickle"],
            report=report,
        )
        with warnings.catch_warnings(), prepare(**values, options=options) as prepared:
            warnings.showwarning = lambda message, *_: report(str(message))
            act(prepared, talks and not chosen["quiet"])


def _do(prepared: Any, talks: bool) -> None:
    from condu.checkpoint.bar import progress_bar

    with progress_bar(str(prepared.folder.name), shown=talks) as progress:
        prepared.options = replace(prepared.options, progress=progress)
        try:
            costs = prepared.run()
        except KeyboardInterrupt:
            complain("interrupted; the same command goes on from what is finished")
            raise typer.Exit(130) from None
    if talks:
        print(costs.line())


def _plan(prepared: Any, talks: bool) -> None:
    from condu.checkpoint.planning import plan

    for line in plan(prepared).lines():
        print(line)


@_command("unify")
def unify(
    base: Annotated[
        str, typer.Argument(metavar="BASE", help="The pretrained model: folder, file, or hub id.")
    ],
    task: Annotated[
        list[str],
        typer.Option(metavar="NAME=FINETUNED", help="A task and its fine-tuned model; repeat."),
    ],
    out: Out,
    state_dtype: Annotated[str, typer.Option(help="Of the unified delta: fp32 or bf16.")] = "fp32",
    zero_sum: Annotated[
        str, typer.Option(help="What a zero sum elects: negative, positive or zero.")
    ] = "negative",
    rescale: Annotated[
        str, typer.Option(help="Rescalers: global, tensor_mean or per_tensor.")
    ] = "global",
    private: Annotated[
        list[str] | None,
        typer.Option(metavar="PATTERN", help="Tensors to keep whole for each task; repeat."),
    ] = None,
    *,
    options: Any,
) -> Any:
    """Fuse fine-tuned models of one base into a new unified checkpoint."""
    import torch

    from condu.checkpoint.states import prepare_unify
    from condu_ext.rule import FusionRule

    dtypes = {"fp32": torch.float32, "bf16": torch.bfloat16}
    if state_dtype not in dtypes:
        raise ValueError(f"--state-dtype must be fp32 or bf16, not {state_dtype!r}")
    return prepare_unify(
        base,
        _tasks(task),
        out,
        rule=FusionRule(zero_sum, rescale),  # type: ignore[arg-type]
        dtype=dtypes[state_dtype],
        private=private or (),
        options=options,
    )


@_command("absorb")
def absorb(
    state: State,
    base: Base,
    task: Annotated[
        str, typer.Option(metavar="NAME=FINETUNED", help="The task and its fine-tuned model.")
    ],
    out: Annotated[
        str | None,
        typer.Option(
            "--out",
            "-o",
            metavar="STATE",
            help="Folder of the new unified checkpoint.",
            show_default="in place of the old one",
        ),
    ] = None,
    *,
    options: Any,
) -> Any:
    """Absorb one more fine-tuned model into a unified checkpoint."""
    from condu.checkpoint.states import prepare_absorb

    ((name, finetuned),) = _tasks([task]).items()
    return prepare_absorb(state, name, finetuned, out, base=base, options=options)


@_command("merge")
def merge(
    first: Annotated[str, typer.Argument(metavar="STATE_A", help="A unified checkpoint.")],
    second: Annotated[str, typer.Argument(metavar="STATE_B", help="Another over the same base.")],
    out: Out,
    *,
    options: Any,
) -> Any:
    """Join two unified checkpoints over one base."""
    from condu.checkpoint.states import prepare_merge

    return prepare_merge(first, second, out, options=options)


@_command("extract")
def extract(
    state: State,
    base: Base,
    task: Annotated[str, typer.Option(help="Name of the task.")],
    out: Annotated[
        str, typer.Option("--out", "-o", metavar="MODEL", help="Folder of the model to make.")
    ],
    format: Annotated[
        str, typer.Option(help="safetensors, or dcp: a PyTorch distributed checkpoint.")
    ] = "safetensors",
    *,
    options: Any,
) -> Any:
    """Write a task's expert as a complete model folder."""
    from condu.checkpoint.experts import prepare_extract

    return prepare_extract(state, task, out, base=base, options=options, format=format)


def _tasks(given: list[str]) -> dict[str, str]:
    tasks: dict[str, str] = {}
    for text in given:
        name, equals, where = text.partition("=")
        if not (name and equals and where):
            raise ValueError(f"--task must be NAME=FINETUNED, not {text!r}")
        if name in tasks:
            raise ValueError(f"--task {name!r} is given twice")
        tasks[name] = where
    return tasks


def _device(name: str) -> str:
    """Of several GPUs that of this process, as torchrun numbers the processes of a machine."""
    local = os.environ.get("LOCAL_RANK")
    return f"cuda:{local}" if name == "cuda" and local is not None else name


def _bytes(text: str) -> int:
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]?)(?:i?B)?", text.strip(), re.IGNORECASE)
    if not match:
        raise ValueError(f"--max-memory must be a size such as 2G or 500M, not {text!r}")
    return int(float(match[1]) * _UNITS[match[2].upper()])
