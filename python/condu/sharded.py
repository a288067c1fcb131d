"""Modules that FSDP2's ``fully_shard`` spread over processes, as ConDU sees them."""

from __future__ import annotations

import sys
from collections.abc import Mapping

from torch import Tensor, nn

from condu_ext.sharding import is_sharded


def show_shards(model: nn.Module) -> None:
    """Make the parameters of FSDP2's modules their shards again.

    After a forward pass without a backward pass some modules, the root at least, keep whole
    parameters in the place of theirs; what is written into those is lost.
    """
    fsdp = sys.modules.get("torch.distributed.fsdp")  # not loaded: there is no such module
    if fsdp is None:
        return
    for module in model.modules():
        if isinstance(module, fsdp.FSDPModule):
            module.reshard()


def placed_like(named: Mapping[str, Tensor]) -> Mapping[str, Tensor] | None:
    """The tensors to place a saved state by: a sharded model's, for any other it is read whole."""
    return named if any(is_sharded(tensor) for tensor in named.values()) else None
