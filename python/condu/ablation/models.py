"""The fine-tuned models that a run left, found and checked before anything is computed."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from safetensors import SafetensorError, safe_open
from torch import nn

from condu.runfolder import RunFolderError
from condu.tuning import Trained

if TYPE_CHECKING:
    from condu.workspace import Workspace


def finetuned_models(workspace: Workspace) -> list[Trained]:
    """One for each task of the benchmark, in its order, all weights fine-tuned from θ_0.

    Raises RunFolderError naming the first task without one, and ValueError naming the file, for one
    that cannot be read or is of another task or another model, from their headers alone.
    """
    tuner = workspace.tuner("full")
    trained = []
    for index, task in enumerate(workspace.benchmark):
        path = tuner.file(index)
        if not path.exists():
            raise RunFolderError(
                f"{path} is missing, the model fine-tuned on task {task.name!r}: condu ablate "
                "needs all weights fine-tuned on every task, as the methods condu and individual "
                f"leave them; this run ({', '.join(workspace.config.methods)}) has not come so far "
                "(condu run --resume goes on), or none of its methods does that"
            )
        _check(path, tuner.live.model)
        found = Trained.open(path)
        if found.task != task.name:
            raise ValueError(f"{path} was fine-tuned on task {found.task!r}, not on {task.name!r}")
        trained.append(found)
    return trained


def _check(path: Path, model: nn.Module) -> None:
    expected = {name: list(tensor.shape) for name, tensor in model.state_dict().items()}
    try:
        with safe_open(path, framework="pt") as file:
            names = file.keys()
            shapes = {name: file.get_slice(name).get_shape() for name in names}
    except SafetensorError as error:
        raise ValueError(f"{path} is not a readable safetensors file ({error})") from error
    for name in sorted(expected.keys() | shapes.keys()):
        of_model, of_file = expected.get(name), shapes.get(name)
        if of_model != of_file:
            raise ValueError(
                f"{path}, tensor {name!r}: {_shape(of_file)} in the file, {_shape(of_model)} in "
                "the model that the run's configuration names"
            )


def _shape(shape: list[int] | None) -> str:
    return "none" if shape is None else f"shape {shape}"
