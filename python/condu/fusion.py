"""ConDU round a live module: fine-tune, absorb into the unified model, answer with any expert."""

from __future__ import annotations

import glob
import os
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import MappingProxyType
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor, nn

import condu_ext as cx
from condu.live import copies, devices_of, is_parameter, matches, write
from condu.restoring import Checkpoint, record_base
from condu.spaces import AdapterSpace, WeightSpace, space_of
from condu_ext import FusionRule, UnifiedDelta
from condu_ext.collective import Step
from condu_ext.sharding import is_sharded, local_part, mesh_of

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

_DEFAULT_RULE = FusionRule()


class ConDU:
    """Continual decoupling and unifying of one module (arXiv 2503.10705).

    Made while the model holds the pretrained weights θ_0, which are remembered. Then, per task::

        optimizer = AdamW(model.parameters())  # a new one: the weights jump back after each task
        train(model, optimizer)
        fusion.absorb("dtd")  # the live weights join the unified model; the model is at θ_0 again
        with fusion.expert("dtd"):
            answer(model)  # with the weights of this task

    What belongs to the unified model are the floating-point parameters that require grad now, with
    names canonical (``module.`` and ``_orig_mod.`` of DistributedDataParallel and torch.compile
    stripped) and matched by ``include`` (all, if None) but not by ``exclude`` (fnmatch patterns;
    CLIP's ``logit_scale`` by default). Persistent floating-point buffers that pass the same
    filters, such as BatchNorm statistics, are private: kept whole per task. ``private`` replaces
    that choice by patterns over parameters and buffers.

    Everything else that training can change (excluded trainable parameters, other persistent
    buffers) stays the base model's: it is put back to θ_0 whenever weights are written, and
    ``absorb`` warns when the change of a floating-point tensor is lost so. Parameters that do not
    require grad when the object is made are neither stored nor touched.

    Weights are written in place: parameters stay the same objects. Optimiser state is the caller's,
    and gradients are set to None, for they belong to weights that are gone. Tensors are looked up
    by name on each call, so a model may be moved to another device or get its weights by
    ``load_state_dict`` between calls; θ_0 and the state follow it to its device. With
    ``offload="cpu"`` both stay in host memory, all fusing is done there, and the GPU holds the live
    weights only.

    Of a model with a LoRA adapter of PEFT, the adapter is what is fused, made while it is fresh:
    with ``space="factors"`` (the paper's way) element by element on its trainable tensors, whose
    common start is θ_0; with ``space="product"`` on the changes of the adapted weights, ΔW = s·B·A,
    where an expert is written into the base weights and the adapter is off until ``reset``. In
    both, ``include`` and ``exclude`` cannot choose among adapted layers.

    A module that FSDP2's ``fully_shard`` spread over processes is one whose ``ConDU`` is made after
    that, in every process, and every process makes the same calls: each keeps its parts of θ_0 and
    of the state. An error in one is raised in all. BatchNorm statistics are no shards but each
    process's own, under DistributedDataParallel too: make them equal (SyncBatchNorm) or freeze them
    where experts must be alike in all processes.

    ``state`` is the ``condu_ext.UnifiedDelta``; its ``drop`` and ``rename`` may be used at any
    time.
    """

    state: UnifiedDelta

    def __init__(
        self,
        model: nn.Module,
        *,
        space: AdapterSpace = "factors",
        rule: FusionRule = _DEFAULT_RULE,
        include: Sequence[str] | None = None,
        exclude: Sequence[str] = ("*logit_scale",),
        offload: Literal["cpu"] | None = None,
        state_dtype: torch.dtype = torch.float32,
        private: Sequence[str] | None = None,
    ) -> None:
        for option, patterns in (("include", include), ("exclude", exclude), ("private", private)):
            if isinstance(patterns, str):
                raise TypeError(f"{option} must be a list of patterns, got the string {patterns!r}")
        chosen_space = space_of(model, space)
        if space == "product" and type(chosen_space) is WeightSpace:
            raise ValueError("space='product', but the model carries no LoRA adapter")
        named = chosen_space.named()
        candidates = chosen_space.candidates(named)
        chosen = {
            name: tensor
            for name, tensor in candidates.items()
            if (include is None or matches(name, include)) and not matches(name, exclude)
        }
        if left_out := (chosen_space.indispensable(named) & candidates.keys()) - chosen.keys():
            raise ValueError(
                f"include={include!r}, exclude={exclude!r} leave out {min(left_out)!r}: which"
                " layers are fused is for the adapter's target_modules to say"
            )
        trainable = [name for name, tensor in chosen.items() if is_parameter(tensor)]
        if not trainable:
            raise ValueError(
                "no trainable floating-point parameter is left to fuse:"
                f" include={include!r}, exclude={exclude!r}"
            )
        buffers = [name for name in chosen if name not in trainable]
        if private is None:
            private = [glob.escape(name) for name in buffers]
        names = trainable + [name for name in buffers if matches(name, private)]
        self._remember(chosen_space, named, names, offload)
        self.state = UnifiedDelta.empty(
            self.pretrained, rule=rule, dtype=state_dtype, private=tuple(private)
        )

    def _remember(
        self,
        space: WeightSpace,
        named: Mapping[str, Tensor],
        names: Iterable[str],
        offload: Literal["cpu"] | None,
    ) -> None:
        if offload not in (None, "cpu"):
            raise ValueError(f"offload must be None or 'cpu', got {offload!r}")
        names = set(names)
        self._space = space
        self._offload = offload
        remembered = names.union(space.restored(named))
        base = copies(
            {name: tensor for name, tensor in named.items() if name in remembered},
            torch.device("cpu") if offload else None,
        )
        self._names = tuple(name for name in base if name in names)
        # an excluded name tied to a fused one is no tensor of its own: restoring would undo that
        fused = {id(base[name]) for name in self._names}
        self._base = {n: t for n, t in base.items() if n in names or id(t) not in fused}
        self._active: str | None = None
        self._in_expert_block = False

    @property
    def model(self) -> nn.Module:
        """The live module."""
        return self._space.model

    @property
    def tasks(self) -> tuple[str, ...]:
        """Absorbed tasks in order."""
        return self.state.tasks

    @property
    def active(self) -> str | None:
        """The task whose expert is in the live weights, None at θ_0 and while fine-tuning."""
        return self._active

    @property
    def pretrained(self) -> Mapping[str, Tensor]:
        """θ_0 of everything in the state, by canonical name. Not copies: do not write to them."""
        return MappingProxyType({name: self._base[name] for name in self._names})

    def check_new_task(self, task: str) -> None:
        """Before a task is fine-tuned: raise what ``absorb(task)`` would raise afterwards, as far
        as it can be known.

        ValueError: a task name that is used or no name, a tensor of another shape or of a narrower
        dtype than θ_0, a parameter that requires grad but did not when this object was made (it
        would be trained and never return to θ_0). KeyError: the model lost a tensor. RuntimeError:
        an expert is active.
        """
        with Step(self._mesh):
            self._refuse_active_expert(task)
            self._space.check()
            self.state.check_new_task(task)
            self._check_trained(task, self._live())

    def _check_trained(self, task: str, live: Mapping[str, Tensor]) -> None:
        """Raises ValueError if what requires grad is not what can be absorbed."""
        for name in self.state.spec.names:
            dtype, base = live[name].dtype, self._base[name].dtype
            if torch.promote_types(dtype, base) != dtype:
                raise ValueError(
                    f"task {task!r}, tensor {name!r}: is {dtype}, narrower than the pretrained"
                    f" weights' {base}"
                )
        known = {id(tensor) for tensor in live.values()}
        for name, tensor in self._space.named().items():
            if tensor.requires_grad and id(tensor) not in known:
                raise ValueError(
                    f"task {task!r}: parameter {name!r} requires grad now, but did not when the"
                    " pretrained weights were remembered"
                )

    def moved(self) -> tuple[str, ...]:
        """The trainable parameters whose live values are not θ_0, in any process."""
        with Step(self._mesh):
            live = self._live()
        return tuple(self._differing(live, [n for n in self._base if live[n].requires_grad]))

    def absorb(self, task: str) -> None:
        """Take the live weights as the task's fine-tuned model into the state, and return the model
        to θ_0.

        The new state is made beside the old one before anything is changed: after an error (task
        name used twice, NaN, a changed dtype or shape; see ``condu_ext.absorb``) state and live
        weights are what they were. RuntimeError while an expert is active, or while the adapter of
        a PEFT model is merged, disabled, or not the one active.
        """
        with Step(self._mesh):
            self._refuse_active_expert(task)
            self._space.check()
            self.state.check_new_task(task)
            live = self._live()
            finetuned, base = self._space.finetuned(live, self.pretrained)
            if devices_of(finetuned) != devices_of(self.pretrained):
                finetuned = copies(finetuned, torch.device("cpu"))
        self.state = cx.absorb(self.state, task, finetuned, base)
        lost = self._space.losses(self._differing(live, self._outside()))
        self._restore(live, self._base)
        if lost:
            warnings.warn(
                f"task {task!r}: the changes of {', '.join(lost)} are lost, for these tensors are"
                " excluded from the fusion; they are back at their pretrained values",
                stacklevel=2,
            )

    def activate(self, task: str) -> None:
        """Write the task's decoupled weights into the live model, until ``reset``.

        Overwrites what the live model holds. KeyError for an unknown task, RuntimeError inside an
        ``expert`` block.
        """
        self._refuse_in_expert_block("activate()")
        self._write_expert(task)

    def reset(self) -> None:
        """Write θ_0 into the live model. Fine-tuned weights that were not absorbed are lost.
        RuntimeError inside an ``expert`` block, or while the adapter of a PEFT model is merged.
        """
        self._refuse_in_expert_block("reset()")
        self._space.check_writable()
        self._restore(self._live(), self._base)
        self._space.show_base()
        self._active = None

    @contextmanager
    def expert(self, task: str) -> Iterator[nn.Module]:
        """The model with the task's decoupled weights; θ_0 is back at the end of the block, also
        after an error.

        RuntimeError while an expert is active already: blocks do not nest. When θ_0 cannot be
        written after an error in the block, that error is raised, and a warning says the rest.
        """
        if self._active is not None:
            raise RuntimeError(
                f"cannot enter expert {task!r} while expert {self._active!r} is active"
            )
        self._write_expert(task)
        self._in_expert_block = True
        try:
            yield self._space.model
        except BaseException:
            self._in_expert_block = False
            try:
                self.reset()
            except Exception as failure:  # must not take the place of the caller's error
                warnings.warn(f"expert {task!r} is still active: {failure}", stacklevel=3)
            raise
        self._in_expert_block = False
        self.reset()

    def save_pretrained(self, path: str | os.PathLike[str]) -> None:
        """Write the state with fingerprints of θ_0 (not θ_0 itself) into a directory; crash-safe,
        see ``UnifiedDelta.save``. All processes of a sharded module call it, and one of any other.
        """
        record_base(self.state, self._space, self.pretrained, self._base)
        self.state.save(path)

    @classmethod
    def from_pretrained(
        cls,
        path: str | os.PathLike[str],
        model: nn.Module,
        *,
        offload: Literal["cpu"] | None = None,
    ) -> ConDU:
        """Read a saved state for a model that holds the same θ_0; which tensors belong to it is
        what the state says. All processes of a sharded module call it, with one folder.

        KeyError when the model lacks one of them, ValueError naming the first tensor that is not
        the one it was saved with, or the adapted layer or rank that differs. A state over adapters
        also knows the weights under them. Only one that was made from saved adapters in the space
        of products knows nothing of θ_0: a warning says so.
        """
        checkpoint = Checkpoint.read(path, model)
        fusion = cls.__new__(cls)
        with Step(mesh_of(checkpoint.named)):
            fusion._remember(checkpoint.space, checkpoint.named, checkpoint.names, offload)
        checkpoint.verify_base(fusion.pretrained, fusion._base)
        state = checkpoint.state
        devices = devices_of(fusion.pretrained)
        moved = len(devices) == 1 and devices != set(state.devices())
        fusion.state = state.to(devices.pop()) if moved else state
        return fusion

    def _write_expert(self, task: str) -> None:
        with Step(self._mesh):
            self._space.check()
            live = self._live()
        mine = {name: live[name].detach() for name in self._names}
        if devices_of(mine) == devices_of(self.pretrained):
            with torch.no_grad():
                cx.decouple_(self.state, task, self.pretrained, out=mine)
        else:
            write(mine, cx.decouple(self.state, task, self.pretrained))
        self._restore(live, [name for name in self._base if name not in mine])
        self._space.show_expert()
        self._active = task

    def _restore(self, live: Mapping[str, Tensor], names: Iterable[str]) -> None:
        """Put θ_0 into the named live tensors; gradients of all of them belong to other weights."""
        write(live, {name: self._base[name] for name in names})
        for tensor in live.values():
            tensor.grad = None

    def _live(self) -> dict[str, Tensor]:
        """The live tensors with a known θ_0, looked up anew, for they may have been replaced."""
        named = self._space.named()
        for name, base in self._base.items():
            if name not in named:
                raise KeyError(f"the model no longer has tensor {name!r}")
            if named[name].shape != base.shape:
                raise ValueError(
                    f"tensor {name!r} of the model has shape {list(named[name].shape)},"
                    f" its pretrained weights {list(base.shape)}"
                )
            if is_sharded(named[name]) != is_sharded(base):
                raise ValueError(
                    f"tensor {name!r} of the model is a {type(named[name].data).__name__}, its"
                    f" pretrained weights a {type(base).__name__}: make the ConDU after the model"
                    " is sharded"
                )
        live = {name: named[name] for name in self._base}
        devices = devices_of(live)
        if self._offload is None and len(devices) == 1 and devices != devices_of(self._base):
            device = devices.pop()
            self._base = copies(self._base, device)
            self.state = self.state.to(device)
        return live

    @property
    def _mesh(self) -> DeviceMesh | None:
        """The processes that share the module, None if it is not sharded."""
        return mesh_of(self._base)

    def _outside(self) -> list[str]:
        """Names of floating-point tensors that are not in the state."""
        return [n for n, t in self._base.items() if n not in self._names and t.is_floating_point()]

    def _differing(self, live: Mapping[str, Tensor], names: Sequence[str]) -> list[str]:
        """Those of the named tensors that are not at θ_0, here or in another process."""
        with Step(self._mesh) as step:
            step.mine = {name for name in names if self._differs(live, name)}
        return [name for name in names if any(name in found for found in step.all)]

    def _differs(self, live: Mapping[str, Tensor], name: str) -> bool:
        base = self._base[name]
        part = local_part(live[name]).to(base.device, base.dtype)
        return not torch.equal(part, local_part(base))

    def _refuse_active_expert(self, task: str) -> None:
        if self._active is not None:
            raise RuntimeError(
                f"cannot absorb task {task!r} while expert {self._active!r} is active: call reset()"
                " and fine-tune from the pretrained weights"
            )

    def _refuse_in_expert_block(self, call: str) -> None:
        if self._in_expert_block:
            raise RuntimeError(f"{call} inside the block of expert {self._active!r}")
