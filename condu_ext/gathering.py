"""Whole tensors on every process of a mesh, one after another, for those who write or hash them."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING

from torch import Tensor

from condu_ext.collective import Step
from condu_ext.sharding import whole

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh


def visit_whole(
    mesh: DeviceMesh | None,
    tensors: Iterable[tuple[str, Tensor]],
    visit: Callable[[str, Tensor], None],
) -> None:
    """Call ``visit`` with the name and the whole of each tensor; a step of all processes, which
    name the same tensors in the same order.

    Where ``visit`` fails, nothing more is visited, but that process takes part in gathering the
    rest, for the others wait for its parts. Then its error is raised on all.
    """
    failure: Exception | None = None
    with Step(mesh):
        for name, tensor in tensors:
            everything = whole(tensor)
            if failure is None:
                try:
                    visit(name, everything)
                except Exception as error:
                    failure = error
        if failure is not None:
            raise failure
