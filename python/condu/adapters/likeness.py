"""Whether two sets of adapter tensors are of the same layers and sizes."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from torch import Tensor

from condu.adapters.names import PREFIX


def check_alike(
    who: str, ours: Mapping[str, Tensor], other: str, theirs: Mapping[str, Tensor]
) -> None:
    """Check factors against factors, or weight changes against weight changes.

    Args:
        who, other: what holds ``ours`` and ``theirs``, for the message.

    Raises:
        ValueError: naming the first layer that only one of them has, or the first tensor of both
            that has another shape.
    """
    layers, others = _layers(ours), _layers(theirs)
    if layers != others:
        layer = min(layers ^ others)
        having, lacking = (who, other) if layer in layers else (other, who)
        raise ValueError(f"{having} has layer {layer!r}, {lacking} does not: other target_modules")
    for name, tensor in theirs.items():
        if name in ours and ours[name].shape != tensor.shape:
            raise ValueError(
                f"{who}, tensor {name!r}: shape {tuple(ours[name].shape)}, but in {other}"
                f" {tuple(tensor.shape)}: another rank, or another base model"
            )


def _layers(names: Iterable[str]) -> set[str]:
    return {name.partition(".lora_")[0].removeprefix(PREFIX) for name in names}
