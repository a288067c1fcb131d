"""A PEFT adapter as a model of differences: what it adds to each weight, multiplied when read."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import ClassVar

import torch
from torch import Tensor

from condu.adapters.folder import TENSORS, AdapterFolder
from condu.checkpoint.sources import Listed

BLOCK = 1 << 18
"""Elements of a product that are computed together, up to a row more: 1 MiB."""


class AdapterSource:
    """The weight changes s·B·A of a LoRA adapter, fp32, by the weights' names in the model without
    adapters (a ``condu.checkpoint.sources.Source``).

    Rows are multiplied in blocks that always begin at the same rows, each by one thread, so that a
    value does not depend on the range it is read in; no more than a block is ever there.

    Raises:
        OSError, ValueError: as ``AdapterFolder.read`` and ``AdapterFolder.deltas``.
    """

    is_delta: ClassVar[bool] = True

    def __init__(self, where: str, folder: Path) -> None:
        adapter = AdapterFolder.read(folder)
        self.where = where
        self.files: Sequence[Path] = (folder / TENSORS,)
        self._products = adapter.products()
        self.tensors: Mapping[str, Listed] = {
            name: Listed(name, torch.float32, product.shape)
            for name, product in self._products.items()
        }

    def read(self, name: str, start: int, stop: int, out: Tensor) -> None:
        product = self._products[name]
        rows, columns = product.shape
        step = max(1, BLOCK // max(1, columns))
        while start < stop:
            first = start // columns // step * step
            with _one_thread():
                block = product.rows(first, min(first + step, rows)).view(-1)
            begin = start - first * columns
            count = min(stop - start, len(block) - begin)
            out[:count].copy_(block[begin : begin + count])
            out, start = out[count:], start + count

    def close(self) -> None:
        self._products = {}


@contextmanager
def _one_thread() -> Iterator[None]:
    """Products by one thread each: ranges are read in several threads already, and with the number
    of threads the library may choose another order of sums."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
