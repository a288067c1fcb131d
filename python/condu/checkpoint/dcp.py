"""Folders of torch.distributed.checkpoint (DCP), as input and as output, in one process.

The planners and the storage of torch.distributed.checkpoint are called one after another, as its
``load`` and ``save`` do on a single rank: those would wait for the other ranks of a process group.
"""

from __future__ import annotations

import math
import os
import threading
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor
from torch.distributed.checkpoint import (
    DefaultLoadPlanner,
    DefaultSavePlanner,
    FileSystemWriter,
)

from condu.checkpoint.dcp_metadata import MetadataReader
from condu.checkpoint.pickles import reason
from condu.checkpoint.safetensors_source import SafetensorsSource
from condu.checkpoint.scratch import ScratchFile
from condu.checkpoint.tensor_files import FileReader, StoredTensor, new_header, seen

_STAGED_TOGETHER = 256 << 20
_SMALL = 1 << 20


class DistributedSource:
    """The model in a DCP folder (a ``condu.checkpoint.sources.Source``).

    What was saved under "state_dict" or "model", if there is such an entry, else everything; names
    lose what wrappers add. Its parts lie in pickles that cannot be read by ranges, so the first
    ``read`` copies the model, part by part, into a file of ``scratch``; ``close`` removes it. Small
    tensors that are not fused are read without that.

    Raises:
        OSError: a file is missing or cannot be read; or no room in ``scratch``, on the first read.
        ValueError: pickles are not allowed; a damaged folder, or one that holds anything else than
            tensors. Damage to data shows on the first read.
    """

    is_delta: ClassVar[bool] = False

    def __init__(
        self, where: str, folder: Path, *, allow_pickle: bool, scratch: Path | None = None
    ) -> None:
        if not allow_pickle:
            raise ValueError(
                f"{folder}: is a checkpoint of torch.distributed, whose files are pickles, and a"
                " pickle can run anything when it is read; allow_pickle=True (--allow-pickle) reads"
                " them and runs nothing that is not torch's"
            )
        self.where = where
        self.folder = folder
        self._reader = MetadataReader(folder)
        self.files: Sequence[Path] = self._reader.files
        model = self._reader.model()
        self._saved_names = {name: saved for name, (saved, _) in model.items()}
        kinds = [(n, kind.properties.dtype, tuple(kind.size)) for n, (_, kind) in model.items()]
        kinds.sort(key=lambda tensor: -tensor[1].itemsize)  # so all of them are aligned
        try:
            self._header, self.tensors, self.staged = new_header(folder, kinds)
        except KeyError as error:
            raise ValueError(f"{folder}: holds tensors of {error}, which is not known") from None
        parts = [(part, kind) for _, kind in model.values() for part in kind.chunks]
        self.largest_part = max(
            (math.prod(part.sizes) * kind.properties.dtype.itemsize for part, kind in parts),
            default=0,
        )
        self._place = scratch
        self._lock = threading.Lock()
        self._scratch: ScratchFile | None = None
        self._small: dict[str, Tensor] = {}
        self._copy = FileReader()

    def read(self, name: str, start: int, stop: int, out: Tensor) -> None:
        tensor = self.tensors[name]
        with self._lock:
            if not tensor.dtype.is_floating_point and tensor.nbytes <= _SMALL:
                if name not in self._small:
                    self._small[name] = torch.empty(tensor.shape, dtype=tensor.dtype)
                    self._load({name: self._small[name]})
                out[: stop - start].copy_(self._small[name].view(-1)[start:stop])
                return
            if self._scratch is None:
                self._scratch = self._staged()
        self._copy.read(replace(tensor, file=self._scratch.path), start, stop, out)

    def close(self) -> None:
        self._copy.close()
        self._small = {}
        if self._scratch is not None:
            self._scratch.close()
            self._scratch = None

    def _staged(self) -> ScratchFile:
        """A copy of the model."""
        scratch = ScratchFile(repr(seen(self.files)), self._place)
        try:
            self._stage(scratch.path)
        except BaseException:
            scratch.close()
            raise
        return scratch

    def _stage(self, file: Path) -> None:
        with open(file, "r+b") as stream:
            stream.write(self._header)
            stream.flush()
            _reserve(file, stream.fileno(), self.staged)
        mapped = np.memmap(file, np.uint8, "r+")
        group: list[StoredTensor] = []
        for tensor in self.tensors.values():
            if group and sum(t.nbytes for t in group) + tensor.nbytes > _STAGED_TOGETHER:
                self._load({t.name: _mapped(mapped, t) for t in group})
                group = []
            group.append(tensor)
        self._load({t.name: _mapped(mapped, t) for t in group})

    def _load(self, tensors: Mapping[str, Tensor]) -> None:
        """Fill tensors with what the folder has under their names."""
        wanted = {self._saved_names[name]: tensor for name, tensor in tensors.items()}
        try:
            metadata = self._reader.read_metadata()
            planner = DefaultLoadPlanner(flatten_state_dict=False)
            planner.set_up_planner(wanted, metadata, is_coordinator=True)
            self._reader.set_up_storage_reader(metadata, is_coordinator=True)
            plan = self._reader.prepare_local_plan(planner.create_local_plan())
            (plan,) = self._reader.prepare_global_plan(planner.create_global_plan([plan]))
            self._reader.read_data(planner.finish_plan(plan), planner).wait()
        except OSError:
            raise
        except Exception as error:  # a damaged pickle can fail as anything
            raise ValueError(f"{self.folder}: {reason(error)}") from None


def write_dcp(folder: Path) -> None:
    """Turn the safetensors files of a folder into a DCP checkpoint that holds the same tensors by
    name; other files stay.

    Values are written from where they lie in the mapped files, a tensor at a time.

    Raises:
        OSError: the folder cannot be read or written, or the disk is full. The safetensors files
            are all there still.
        ValueError: there are none, or damaged ones.
    """
    model = SafetensorsSource.of_folder(str(folder), folder)
    if model is None:
        raise ValueError(f"{folder}: holds no safetensors files")
    files = {file: np.memmap(file, np.uint8, "c") for file in model.weights}
    tensors: dict[str, Any] = {
        name: _mapped(files[tensor.file], tensor) for name, tensor in model.tensors.items()
    }
    _save(tensors, folder)
    for file in (*model.weights, *([model.index] if model.index else [])):
        file.unlink()


def _save(tensors: dict[str, Any], folder: Path) -> None:
    planner, writer = DefaultSavePlanner(), FileSystemWriter(folder)
    planner.set_up_planner(tensors, writer.storage_meta(), is_coordinator=True)
    writer.set_up_storage_writer(is_coordinator=True)
    plan = writer.prepare_local_plan(planner.create_local_plan())
    plans, metadata = planner.create_global_plan([plan])
    (plan,) = writer.prepare_global_plan(plans)
    written = writer.write_data(planner.finish_plan(plan), planner).wait()
    writer.finish(metadata, [written])


def _mapped(file: np.memmap[Any, Any], tensor: StoredTensor) -> Tensor:
    part = file[tensor.offset : tensor.offset + tensor.nbytes]
    return torch.from_numpy(part).view(tensor.dtype).view(tensor.shape)


def _reserve(file: Path, descriptor: int, size: int) -> None:
    """Make a file as long as it will be: where the disk is full, mapped pages would be lost."""
    if not hasattr(os, "posix_fallocate"):
        os.truncate(descriptor, size)
        return
    try:
        os.posix_fallocate(descriptor, 0, size)
    except OSError as error:
        error.filename = str(file)
        raise
