"""Prototype set: one direction per class and task in the feature space of the frozen pretrained
model.

The paper writes ``P = f(y, θ_0) + mean_m f(x_m, θ_0)``. The authors' code, followed here, takes

    P = normalise((mean of the normalised image features + mean over templates of the normalised
    text features) / 2)

The two point in the same direction when the paper's f is read as "normalised feature" and f(y) as
the mean over all templates; the norm is irrelevant, for voting uses cosines.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from condu_ext.files import replace

_FORMAT = "condu-prototypes"
_VERSION = "1"


class PrototypeSet:
    """Prototypes by task, in the order in which tasks were added: each float32 [classes, D] on the
    CPU, rows of length 1.
    """

    def __init__(self) -> None:
        self._prototypes: dict[str, Tensor] = {}

    @property
    def tasks(self) -> tuple[str, ...]:
        """Task names in the order in which they joined; votes are indices into it."""
        return tuple(self._prototypes)

    def __len__(self) -> int:
        return len(self._prototypes)

    def __iter__(self) -> Iterator[str]:
        return iter(self._prototypes)

    def __contains__(self, task: object) -> bool:
        return task in self._prototypes

    def __getitem__(self, task: str) -> Tensor:
        """Prototypes [classes, D] of one task; KeyError for an unknown one."""
        return self._prototypes[self._known(task)]

    def add(self, task: str, image_features: Tensor, labels: Tensor, text_features: Tensor) -> None:
        """Add a task from frozen features.

        ``image_features`` [M, D]: training images, normalised here. ``labels`` integers [M] in
        0..classes-1. ``text_features`` [classes, D]: per class the mean over all templates of the
        normalised text features, taken as it is (normalising that mean would change the balance of
        image and text). Raises ValueError naming the task, and the class where there is one: a task
        that is there already, shapes that do not fit, labels out of range, features that are not
        finite, a class without images, image and text that cancel out.
        """
        if task in self._prototypes:
            raise ValueError(f"task {task!r} already has prototypes")
        self._check(task, image_features, labels, text_features)
        classes, dim = text_features.shape
        labels = labels.to("cpu", torch.int64)
        images = F.normalize(image_features.detach().to("cpu", torch.float32), dim=-1)
        counts = torch.bincount(labels, minlength=classes)
        empty = (counts == 0).nonzero().flatten().tolist()
        if empty:
            raise ValueError(f"task {task!r}: class {empty[0]} of {classes} has no images")
        sums = torch.zeros(classes, dim, dtype=torch.float64).index_add_(0, labels, images.double())
        mean_image = sums / counts.unsqueeze(1)
        both = (mean_image + text_features.detach().to("cpu", torch.float64)) / 2
        norms = both.norm(dim=1, keepdim=True)
        if bool((norms == 0).any()):
            lost = int((norms.flatten() == 0).nonzero()[0])
            raise ValueError(f"task {task!r}: image and text features of class {lost} cancel out")
        self._prototypes[task] = (both / norms).float()

    def first(self, count: int) -> PrototypeSet:
        """The prototypes of the first ``count`` tasks, as a set of its own."""
        part = PrototypeSet()
        part._prototypes = dict(list(self._prototypes.items())[:count])
        return part

    def features(self) -> tuple[Tensor, Tensor]:
        """All prototypes, float32 [P, D], and int64 offsets [T + 1]: task t owns rows offsets[t] to
        offsets[t + 1].
        """
        sizes = [len(p) for p in self._prototypes.values()]
        offsets = torch.tensor([0, *sizes], dtype=torch.int64).cumsum(0)
        if not sizes:
            return torch.empty(0, 0), offsets
        return torch.cat(list(self._prototypes.values())), offsets

    def drop(self, task: str) -> None:
        """Remove a task (as ``UnifiedDelta.drop``); KeyError for an unknown one."""
        del self._prototypes[self._known(task)]

    def rename(self, task: str, new: str) -> None:
        """Give a task another name in the same place (as ``UnifiedDelta.rename``)."""
        self._known(task)
        if new != task and new in self._prototypes:
            raise ValueError(f"cannot rename task {task!r}: {new!r} already has prototypes")
        self._prototypes = {new if t == task else t: p for t, p in self._prototypes.items()}

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write one safetensors file; what was there is replaced at once or, after a crash, not at
        all.
        """
        path = Path(path)
        # tensors by number: a task name may hold anything, so it stands in the header only
        tensors = {str(i): p for i, p in enumerate(self._prototypes.values())}
        header = {"format": _FORMAT, "version": _VERSION, "tasks": json.dumps(self.tasks)}
        replace(path, lambda file: save_file(tensors, file, metadata=header))

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> PrototypeSet:
        """Read a file written by ``save``; ValueError naming the file when it is something else or
        broken.
        """
        path = Path(path)
        loaded = cls()
        try:
            with safe_open(path, framework="pt") as file:
                header = file.metadata() or {}
                if (header.get("format"), header.get("version")) != (_FORMAT, _VERSION):
                    raise ValueError(
                        f"{path}: not a prototype set of version {_VERSION}, its header says"
                        f" format {header.get('format')!r}, version {header.get('version')!r}"
                    )
                tasks = json.loads(header["tasks"])
                if set(file.keys()) != {str(i) for i in range(len(set(tasks)))}:
                    raise ValueError(f"{path}: tasks {tasks} but tensors {sorted(file.keys())}")
                for i, task in enumerate(tasks):
                    loaded._prototypes[task] = file.get_tensor(str(i))
        except SafetensorError as error:
            raise ValueError(f"{path}: not a readable safetensors file ({error})") from error
        return loaded

    def _known(self, task: str) -> str:
        if task not in self._prototypes:
            raise KeyError(f"no prototypes of task {task!r}; there are {list(self.tasks)}")
        return task

    def _check(
        self, task: str, image_features: Tensor, labels: Tensor, text_features: Tensor
    ) -> None:
        images, text = list(image_features.shape), list(text_features.shape)
        if len(text) != 2 or 0 in text:
            raise ValueError(f"task {task!r}: text_features must be [classes, D], got {text}")
        classes, dim = text
        for other, prototypes in self._prototypes.items():
            if prototypes.shape[1] != dim:
                raise ValueError(
                    f"task {task!r}: features have {dim} dimensions,"
                    f" those of task {other!r} have {prototypes.shape[1]}"
                )
        if len(images) != 2 or images[1] != dim:
            raise ValueError(f"task {task!r}: image_features must be [M, {dim}], got {images}")
        if list(labels.shape) != images[:1] or labels.is_floating_point():
            raise ValueError(
                f"task {task!r}: labels must be {images[0]} integers,"
                f" got {labels.dtype} {list(labels.shape)}"
            )
        outside = labels[(labels < 0) | (labels >= classes)]
        if len(outside):
            raise ValueError(
                f"task {task!r}: labels must be from 0 to {classes - 1}, got {int(outside[0])}"
            )
        for name, features in (
            ("image_features", image_features),
            ("text_features", text_features),
        ):
            if not bool(torch.isfinite(features).all()):
                raise ValueError(f"task {task!r}: {name} hold values that are not finite")
