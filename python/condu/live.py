"""The tensors of a live module: their names, and copies to go back to."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from fnmatch import fnmatchcase

import torch
from torch import Tensor, nn

from condu_ext.sharding import is_sharded


def canonical_name(name: str) -> str:
    """A tensor's name without what wrappers add: leading ``module.``, ``_orig_mod.`` anywhere."""
    segments = [segment for segment in name.split(".") if segment != "_orig_mod"]
    while len(segments) > 1 and segments[0] == "module":
        del segments[0]
    return ".".join(segments)


def named_tensors(
    model: nn.Module, name_of: Callable[[str], str] = canonical_name
) -> dict[str, Tensor]:
    """Parameters and persistent buffers by canonical name, tied ones under each of their names.

    Raises:
        ValueError: two tensors have the same canonical name.
    """
    # asked first, for it also makes FSDP2 put shards in the place of what a forward pass gathered
    saved = model.state_dict().keys()
    tensors: dict[str, Tensor] = {}
    for name, tensor in (
        *model.named_parameters(remove_duplicate=False),
        *((n, b) for n, b in model.named_buffers(remove_duplicate=False) if n in saved),
    ):
        canonical = name_of(name)
        if canonical in tensors:
            raise ValueError(
                f"two tensors have the same canonical name {canonical!r}: one is {name!r}"
            )
        tensors[canonical] = tensor
    return tensors


def changeable(named: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What training can change: parameters that require grad, and buffers."""
    return {n: t for n, t in named.items() if t.requires_grad or not is_parameter(t)}


def is_parameter(tensor: Tensor) -> bool:
    """Whether a module's tensor is a parameter, not a buffer."""
    return isinstance(tensor, nn.Parameter)


def matches(name: str, patterns: Iterable[str]) -> bool:
    """Whether a name matches one of the fnmatch patterns."""
    return any(fnmatchcase(name, pattern) for pattern in patterns)


def devices_of(tensors: Mapping[str, Tensor]) -> set[torch.device]:
    """The devices that hold the tensors."""
    return {tensor.device for tensor in tensors.values()}


def copies(tensors: Mapping[str, Tensor], device: torch.device | None = None) -> dict[str, Tensor]:
    """Copies, on ``device`` or each where it is; tied tensors are tied again."""
    copied: dict[tuple[object, ...], Tensor] = {}
    result = {}
    for name, tensor in tensors.items():
        # a shard may be empty, and all processes must find the same ties: the object itself tells
        place = id(tensor) if is_sharded(tensor) else tensor.data_ptr()
        key = (place, tensor.device, tensor.dtype, tensor.shape, tensor.stride())
        if key not in copied:
            copied[key] = tensor.detach().to(device or tensor.device, copy=True)
        result[name] = copied[key]
    return result


@torch.no_grad()
def write(out: Mapping[str, Tensor], values: Mapping[str, Tensor]) -> None:
    """Write values into live tensors in place."""
    for name, value in values.items():
        out[name].copy_(value)
