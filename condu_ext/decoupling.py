"""Decouple: a task's expert θ̃ = θ_0 + λ·(M ⊙ u), as new tensors or into a live model.

Arguments and errors are those of :mod:`condu_ext.fusion`. With a sharded state both are collective:
every process gets or writes its own part.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from condu_ext._dispatch import Sources, kernels_for, read_base
from condu_ext._modes import without_autograd
from condu_ext.collective import Step
from condu_ext.inputs import Model, check_devices, resolve
from condu_ext.sharding import local_part
from condu_ext.targets import check_writable, write_through
from condu_ext.unified import UnifiedDelta


@without_autograd
def decouple(
    state: UnifiedDelta,
    task: str,
    pretrained: Model | None,
    *,
    backend: str | None = None,
) -> dict[str, Tensor]:
    """A task's expert θ̃ = θ_0 + λ·(M ⊙ u) by name, in θ_0's dtypes (without θ_0: d̃, in fp32).

    Where the mask is 0, θ̃ has θ_0's bits. Tied names share one tensor. Integer entries of
    ``pretrained`` and the task's private tensors are copied into the result (the base's private
    tensors where the task has none, see ``missing``).
    """
    with state.lock:
        with Step(state.spec.mesh) as step:
            step.claims |= _claims(task, pretrained)
            base, kernels = _check_base(state, task, pretrained, backend)
        with Step(state.spec.mesh):
            local: list[Tensor] = []
            places = zip(state.spec.tensors, base, state.devices(), strict=True)
            for entry, theta_0, device in places:
                dtype = torch.float32 if theta_0 is None else theta_0.dtype
                flat = torch.empty(entry.local_numel, dtype=dtype, device=device)
                local.append(entry.unflatten(flat))
            _write_expert(state, task, base, local, kernels)
            out = {e.name: e.wrap(t) for e, t in zip(state.spec.tensors, local, strict=True)}
            out |= {alias: out[target] for alias, target in state.spec.aliases.items()}
            kept = state.spec.fixed | state.spec.private_names
            out |= {name: t.clone() for name, t in (pretrained or {}).items() if name in kept}
            out |= state.private(task)
        return out


def decouple_(
    state: UnifiedDelta,
    task: str,
    pretrained: Model | None,
    *,
    out: Model,
    backend: str | None = None,
) -> None:
    """Write a task's expert into existing tensors, such as a model's parameters, in place.

    No temporary copy is made, except of a single tensor whose memory order differs from the
    state's. Autograd's version counters are bumped.

    Args:
        out: tensors by name; every fused tensor (under any of its tied names) and every private
            tensor of the task must be there.

    Raises:
        RuntimeError: a leaf that requires grad, outside ``torch.no_grad()``.
        ValueError: ``out`` shares memory with ``pretrained``, or is expanded.
    """
    with state.lock:
        with Step(state.spec.mesh) as step:
            step.claims |= _claims(task, pretrained)
            base, kernels = _check_base(state, task, pretrained, backend)
            targets = [t for t in resolve(state.spec, "out", out, "error") if t is not None]
            base_private = {
                n: t for n, t in (pretrained or {}).items() if n in state.spec.private_names
            }
            private = base_private | state.private_of(task)
            arenas = [arena.u for arena in state.arenas]
            check_writable(state.spec, out, targets, base, private, state.devices(), arenas)
        with Step(state.spec.mesh), torch.no_grad():
            _write_expert(state, task, base, targets, kernels)
            for name, tensor in private.items():
                local_part(out[name]).copy_(local_part(tensor))
        written = [*(out[n] for n in out if n not in state.spec.fixed)]
        torch.autograd.graph.increment_version([t for t in written if not t.is_inference()])


def _claims(task: str, pretrained: Model | None) -> dict[str, object]:
    """What processes that share a model must agree on."""
    return {"the task": task, "whether there is a pretrained model": pretrained is not None}


def _check_base(
    state: UnifiedDelta, task: str, pretrained: Model | None, backend: str | None
) -> tuple[list[Tensor | None], list[Any]]:
    """θ_0 where the state's tensors are, and the kernels of each arena."""
    state.position(task)
    kernels = [kernels_for(backend, arena.device) for arena in state.arenas]
    base = read_base(state.spec, pretrained)
    check_devices(state.spec, "pretrained", base, state.devices())
    return base, kernels


def _write_expert(
    state: UnifiedDelta,
    task: str,
    base: list[Tensor | None],
    targets: list[Tensor],
    kernels: list[Any],
) -> None:
    position = state.position(task)
    sources = Sources(state.spec, base)
    for arena, own in zip(state.arenas, kernels, strict=True):
        entries = [state.spec.tensors[k] for k in arena.index]
        has_base = base[arena.index[0]] is not None
        theta_0 = sources.flat(arena.index, None, arena.device) if has_base else []
        with write_through(entries, [targets[k] for k in arena.index]) as flat:
            own.decouple_(
                flat,
                arena.u,
                arena.planes[position],
                arena.rescaler[position],
                theta_0,
                sources.via(arena.index) if theta_0 else [],
            )
