"""Adapters of small models in folders, and the commands that take them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from peft import PeftModel
from tiny_adapters import MODELS, adapted, finetune
from typer.testing import CliRunner, Result

import condu_ext as cx
from condu.adapters import absorb_adapter
from condu.cli import app


def condu(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def refused(*arguments: object) -> str:
    """The one line that a command wrote before it ended with status 2."""
    result = condu(*arguments)
    assert result.exit_code == 2, result.output
    assert result.stdout == ""
    (line,) = result.stderr.splitlines()
    return line


def save_tasks(kind: str, tasks: str = "ab", **options: Any) -> PeftModel:
    """Folders "start" and one for each task; the model is left at its start."""
    model = adapted(kind, **options)
    start = {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}
    model.save_pretrained("start")
    for seed, task in enumerate(tasks):
        finetune(model, seed)
        model.save_pretrained(task)
        model.load_state_dict(start, strict=False)
    return model


def absorbed(*tasks: str, init: str | None = None) -> cx.UnifiedDelta:
    for task in tasks:
        state = absorb_adapter("state", task, task, init=init)
    return state


def files(folder: str) -> dict[str, bytes]:
    return {f.name: f.read_bytes() for f in Path(folder).iterdir() if f.name != ".lock"}


def load(kind: str, folder: str) -> PeftModel:
    return PeftModel.from_pretrained(MODELS[kind][0](), folder)


def present() -> list[str]:
    """What is in the current folder, but locks."""
    return sorted(p.name for p in Path().iterdir() if p.suffix != ".lock")


def change(folder: str, **values: Any) -> None:
    path = Path(folder, "adapter_config.json")
    path.write_text(json.dumps(json.loads(path.read_text()) | values))
