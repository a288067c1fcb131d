"""A PEFT adapter as a model of differences: what it adds to each weight, multiplied when read."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import ClassVar

import torch
from torch import Tensor

from condu.adapters.folder import CONFIG, TENSORS, AdapterFolder
from condu.adapters.layers import Product
from condu.checkpoint.loaded_names import names_when_loaded
from condu.checkpoint.sources import Source
from condu.checkpoint.tensor_files import Stored

BLOCK = 1 << 18
"""Elements of a product that are computed together, up to a row more: 1 MiB."""


class AdapterSource:
    """The weight changes s·B·A of a LoRA adapter, fp32, by the weights' names in the model without
    adapters (a ``condu.checkpoint.sources.Source``).

    Rows are multiplied in blocks that always begin at the same rows, each by one thread, so that a
    value does not depend on the range it is read in; no more than a block is ever there.

    base: the model that the adapter is for, if its names are to be taken where they differ: a
        vision-language model's files often have other names than the model that was trained.

    Raises:
        OSError, ValueError: as ``AdapterFolder.read`` and ``AdapterFolder.deltas``.
    """

    is_delta: ClassVar[bool] = True
    folder: ClassVar[None] = None
    staged: ClassVar[int] = 0
    largest_part: ClassVar[int] = 0

    def __init__(self, where: str, folder: Path, base: Source | None = None) -> None:
        adapter = AdapterFolder.read(folder)
        self.where = where
        self.files: Sequence[Path] = (folder / CONFIG, folder / TENSORS)
        self._products = _named_as_in(base, adapter.products())
        self.tensors: Mapping[str, Stored] = {
            name: Stored(name, torch.float32, product.shape)
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


def _named_as_in(base: Source | None, products: dict[str, Product]) -> dict[str, Product]:
    if base is None or base.folder is None or products.keys() <= base.tensors.keys():
        return products
    stored = names_when_loaded(base.folder, base.tensors)
    return {stored.get(name, name): product for name, product in products.items()}


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
