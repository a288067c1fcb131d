"""Checks of models given by name, before anything is computed.

A model is a mapping from tensor names to tensors: a state dict, or ``dict(named_parameters())``.
Floating tensors are fused; integer and bool entries must equal the base model's; names that match
a ``private`` pattern are stored whole for each task; tied tensors count once.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from fnmatch import fnmatchcase

import torch
from torch import Tensor

from condu_ext.layout import ModelSpec, TensorSpec, memory_order

Model = Mapping[str, Tensor]
FUSED_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# Subclasses that are plain memory; any other may be quantised or sharded.
_PLAIN_TYPES = (Tensor, torch.nn.Parameter, torch.nn.Buffer)


def check_mapping(
    who: str,
    value: object,
    such_as: str = "dict(module.named_parameters()) or module.state_dict()",
) -> None:
    """Refuses what is given in place of names and tensors: a module, a list, a number.

    Raises:
        TypeError: naming the argument, with ``such_as`` as an example of what is meant.
    """
    if not isinstance(value, Mapping):
        raise TypeError(
            f"{who}: expected a mapping from names to tensors, got {type(value).__name__}; "
            f"use {such_as}"
        )


def check_tensor(who: str, name: str, tensor: object) -> Tensor:
    """The tensor, if it is one that can be fused, compared or stored.

    Raises:
        TypeError: not a plain, dense, real tensor in memory; the message names it.
    """
    where = f"{who}, tensor {name!r}"
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{where}: expected a torch.Tensor, got {type(tensor).__name__}")
    if type(tensor) not in _PLAIN_TYPES:
        raise TypeError(f"{where}: tensors of type {type(tensor).__name__} cannot be fused")
    if tensor.is_quantized or tensor.layout != torch.strided:
        raise TypeError(f"{where}: quantised and sparse tensors cannot be fused")
    if tensor.device.type == "meta":
        raise TypeError(f"{where}: is on the meta device and has no values")
    return tensor


def fixed_names(who: str, model: Model) -> frozenset[str]:
    """The names of integer and bool entries.

    Raises:
        TypeError: as :func:`check_mapping` and :func:`check_tensor`.
    """
    check_mapping(who, model)
    tensors = {name: check_tensor(who, name, value) for name, value in model.items()}
    return frozenset(name for name, tensor in tensors.items() if not _is_number_array(tensor))


def check_fusable(who: str, name: str, tensor: Tensor) -> None:
    """Refuses floating dtypes that the kernels do not read (float64, float8, complex)."""
    if tensor.dtype not in FUSED_DTYPES:
        raise TypeError(
            f"{who}, tensor {name!r}: {tensor.dtype} cannot be fused; "
            "use float32, bfloat16 or float16, or make the tensor private"
        )


def is_private(name: str, patterns: Iterable[str]) -> bool:
    """Whether a name matches one of the fnmatch patterns."""
    return any(fnmatchcase(name, pattern) for pattern in patterns)


def _is_number_array(tensor: Tensor) -> bool:
    return tensor.is_floating_point() or tensor.is_complex()


def _span(tensor: Tensor) -> tuple[int, int]:
    """First byte and end of the memory between a tensor's lowest and highest element."""
    steps = sum((n - 1) * s for n, s in zip(tensor.shape, tensor.stride(), strict=True))
    start = tensor.data_ptr()
    return start, start + (steps + 1) * tensor.element_size()


def _same_memory(a: Tensor, b: Tensor) -> bool:
    return (
        a.data_ptr() == b.data_ptr()
        and a.shape == b.shape
        and a.stride() == b.stride()
        and a.dtype == b.dtype
    )


def _is_dense(tensor: Tensor) -> bool:
    return tensor.permute(memory_order(tensor)).is_contiguous()


def share_elements(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors have memory in common. Exact for views of one dtype: columns of one
    matrix may interleave without sharing an element."""
    if a.device != b.device or not a.numel() or not b.numel():
        return False
    (start_a, end_a), (start_b, end_b) = _span(a), _span(b)
    if end_a <= start_b or end_b <= start_a:
        return False
    size = a.element_size()
    aligned = (start_a - start_b) % size == 0 and b.element_size() == size
    if (_is_dense(a) and _is_dense(b)) or not aligned:
        return True
    first = min(start_a, start_b)
    seen = torch.zeros((max(end_a, end_b) - first) // size, dtype=torch.bool, device="cpu")
    seen.as_strided(a.shape, a.stride(), (start_a - first) // size).fill_(True)
    return bool(seen.as_strided(b.shape, b.stride(), (start_b - first) // size).any())


def find_shared(tensors: Iterable[tuple[str, Tensor]]) -> tuple[str, str] | None:
    """The first two names, in memory order, whose tensors have elements in common."""
    sorted_by_start = sorted(tensors, key=lambda item: item[1].data_ptr())
    open_spans: list[tuple[int, str, Tensor]] = []
    for name, tensor in sorted_by_start:
        start, end = _span(tensor)
        open_spans = [span for span in open_spans if span[0] > start]
        for _, other, earlier in open_spans:
            if share_elements(earlier, tensor):
                return other, name
        open_spans.append((end, name, tensor))
    return None


def find_aliases(who: str, tensors: Model) -> dict[str, str]:
    """Tied tensors: later name → first name of the same memory, shape, stride, dtype and sign.

    Raises:
        ValueError: two tensors share only a part of their memory; the message names both.
    """
    aliases: dict[str, str] = {}
    first: dict[tuple[object, ...], str] = {}
    for name, tensor in tensors.items():
        if tensor.numel():
            where = (tensor.device, tensor.data_ptr(), tensor.shape, tensor.stride())
            key = (*where, tensor.dtype, tensor.is_neg())
            if first.setdefault(key, name) != name:
                aliases[name] = first[key]
    if shared := find_shared([(name, tensors[name]) for name in first.values()]):
        raise ValueError(
            f"{who}: tensors {shared[0]!r} and {shared[1]!r} share a part of their memory"
        )
    return aliases


def describe(who: str, model: Model, private: Iterable[str]) -> ModelSpec:
    """What a state will know of a model: its fused tensors, ties, fixed and private names.

    Raises:
        TypeError: no mapping, an entry that is no plain tensor, or a dtype that cannot be fused.
        ValueError: no tensor to fuse, or tensors that overlap.
    """
    if isinstance(private, str):
        raise TypeError(f"private: expected a tuple of patterns, got the string {private!r}")
    check_mapping(who, model)
    private = tuple(private)
    fused, fixed = {}, set()
    for name, value in model.items():
        tensor = check_tensor(who, name, value)
        if is_private(name, private):
            continue
        if not _is_number_array(tensor):
            fixed.add(name)
            continue
        check_fusable(who, name, tensor)
        fused[name] = tensor
    if not fused:
        raise ValueError(f"{who}: there is no floating-point tensor to fuse")
    aliases = find_aliases(who, fused)
    specs = tuple(
        TensorSpec(name, tuple(tensor.shape), memory_order(tensor))
        for name, tensor in fused.items()
        if name not in aliases
    )
    private_names = frozenset(name for name in model if is_private(name, private))
    return ModelSpec(specs, aliases, frozenset(fixed), private, private_names)


def check_private(spec: ModelSpec, who: str, model: Model, missing: str) -> None:
    """A task brings every private tensor that the base has, unless it may lack tensors.

    Raises:
        KeyError: naming the first that is missing.
    """
    absent = sorted(spec.private_names - set(model))
    if absent and missing == "error":
        raise KeyError(f"{who}: private tensor {absent[0]!r} is missing")


def resolve(
    spec: ModelSpec, who: str, model: Model, missing: str, *, base: str = "the base"
) -> list[Tensor | None]:
    """The tensors of ``model`` in the order of ``spec.tensors``; None where one may be missing.
    ``base`` is what errors call the model that the spec describes.

    Raises:
        KeyError: a tensor is missing (under all its names), and ``missing`` is ``"error"``.
        ValueError: an extra tensor, another shape, or tied names with different values.
        TypeError: as :func:`check_mapping` and :func:`check_tensor`.
    """
    check_mapping(who, model)
    if missing not in ("error", "unchanged"):
        raise ValueError(f"missing must be 'error' or 'unchanged', not {missing!r}")
    known = {t.name for t in spec.tensors} | set(spec.aliases) | spec.fixed
    for name, value in model.items():
        tensor = check_tensor(who, name, value)
        if name not in known and not is_private(name, spec.private):
            raise ValueError(f"{who}: tensor {name!r} {tuple(tensor.shape)} is not in {base}")
    result: list[Tensor | None] = []
    for entry in spec.tensors:
        given = [model[name] for name in spec.names_of(entry.name) if name in model]
        if not given:
            if missing == "error":
                raise KeyError(f"{who}: tensor {entry.name!r} is missing")
            result.append(None)
            continue
        tensor = given[0]
        for other in given:
            if tuple(other.shape) != entry.shape:
                raise ValueError(
                    f"{who}, tensor {entry.name!r}: shape {tuple(other.shape)}, "
                    f"expected {entry.shape}"
                )
            check_fusable(who, entry.name, other)
            if not _same_memory(tensor, other) and not torch.equal(tensor, other):
                raise ValueError(
                    f"{who}: {' and '.join(map(repr, spec.names_of(entry.name)))} are tied in "
                    f"{base} but differ here"
                )
        result.append(tensor.detach())
    return result


def _equal(a: Tensor, b: Tensor) -> bool:
    return a.dtype == b.dtype and torch.equal(a.to(b.device), b)


def check_fixed(spec: ModelSpec, who: str, model: Model, base: Model | None) -> None:
    """Integer and bool entries equal the base's (or are zero in a delta).

    Raises:
        ValueError: naming the entry that differs.
    """
    for name in sorted(spec.fixed):
        if name not in model:
            continue
        value = model[name]
        if base is None:
            if value.any():
                raise ValueError(f"{who}: integer tensor {name!r} of a delta is not zero")
        elif name in base and not _equal(value, base[name]):
            raise ValueError(
                f"{who}: integer tensor {name!r} ({value.dtype}) differs from the base's "
                f"({base[name].dtype}); it cannot be fused, but it can be private"
            )


def private_tensors(spec: ModelSpec, model: Model) -> dict[str, Tensor]:
    """Copies of a model's private tensors."""
    return {
        name: tensor.detach().clone()
        for name, tensor in model.items()
        if is_private(name, spec.private)
    }


def check_devices(
    spec: ModelSpec,
    who: str,
    tensors: list[Tensor | None],
    devices: list[torch.device],
    other: str = "the state's part for it",
) -> None:
    """Each tensor is where the other side's is.

    Raises:
        ValueError: naming the tensor and both devices.
    """
    for entry, tensor, device in zip(spec.tensors, tensors, devices, strict=True):
        if tensor is not None and tensor.device != device:
            raise ValueError(
                f"{who}, tensor {entry.name!r}: is on {tensor.device}, "
                f"but {other} is on {device}; move one of them"
            )


def with_rounding(
    spec: ModelSpec,
    who: str,
    tensors: list[Tensor | None],
    base: list[Tensor | None],
    *,
    match_dtype: bool,
    settled: bool,
) -> ModelSpec:
    """The spec with θ_0 rounded to the fine-tuned model's dtype where that is narrower.

    ``settled`` says that earlier tasks already fixed from which θ_0 they start.

    Raises:
        ValueError: a fine-tuned tensor is narrower than the base's and ``match_dtype`` is off
            (rounding noise would vote on nearly every parameter), or its dtype contradicts the
            θ_0 that earlier tasks started from.
    """
    entries = []
    for entry, theta, theta_0 in zip(spec.tensors, tensors, base, strict=True):
        if theta is None or theta_0 is None:
            entries.append(entry)
            continue
        narrow = torch.promote_types(theta.dtype, theta_0.dtype) != theta.dtype
        if narrow and not match_dtype:
            raise ValueError(
                f"{who}, tensor {entry.name!r}: is {theta.dtype}, narrower than the base's "
                f"{theta_0.dtype}; match_dtype=True rounds the base first"
            )
        via = theta.dtype if narrow else None
        if settled and via != entry.via:
            raise ValueError(
                f"{who}, tensor {entry.name!r}: is {theta.dtype}, but earlier tasks started from "
                f"the base in {entry.via or theta_0.dtype}"
            )
        entries.append(replace(entry, via=via))
    return replace(spec, tensors=tuple(entries))
