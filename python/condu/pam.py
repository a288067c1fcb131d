"""Aligned merging (PAM) round a live model: one adapter that evolves from task to task.

Continual Learning in Vision-Language Models via Aligned Model Merging, arXiv 2506.03189; the
operations on tensors are those of `condu_ext.alignment`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal, get_args

import torch
from torch import Tensor, nn

import condu_ext as cx
from condu.live import is_parameter, named_tensors
from condu_ext.inputs import check_fusable
from condu_ext.sharding import refuse_sharded

Average = Literal["half", "mean"]


class AlignedMerging:
    """Fine-tune on task after task, and merge each result into one global adapter::

        merging = AlignedMerging(model)  # its parameters that require grad are the adapter
        for task in tasks:
            optimizer = AdamW(...)  # a new one
            for batch in task:
                ...
                optimizer.step()
                merging.align(optimizer)
            merging.merge()  # the live adapter is the global one now

    With g the global adapter and w the live one that is being fine-tuned from it: every `period`
    steps the weights that conflict with the strongest of g (those of the share `top` by magnitude,
    per tensor or over all by `scope`) are put back, to zero or to g as `to` says, and if
    `reset_optimizer`, so is what the optimiser remembers of them; at the end of the task
    g ← a·g + (1 − a)·w, where a is 1/2 (`average="half"`) or, for the t-th task, 1 − 1/t
    (`"mean"`: all tasks count the same). The first task's adapter becomes the global one as it is:
    there is nothing to align or to average with.

    `align=False` leaves the aligning out, which makes it plain averaging. The paper gives top =
    50 %; it gives neither period, scope, a, nor what happens to the optimiser's state.

    Weights are written in place; they are looked up by name on each call. Every process of a
    distributed run makes the same calls; sharded weights (FSDP2) and float64 are a TypeError.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        top: float = 0.5,
        period: int = 10,
        to: Literal["zero", "global"] = "zero",
        scope: Literal["tensor", "global"] = "tensor",
        average: Average = "half",
        reset_optimizer: bool = True,
        align: bool = True,
    ) -> None:
        if isinstance(period, bool) or not isinstance(period, int) or period < 1:
            raise ValueError(f"period must be a number of steps from 1 on, got {period!r}")
        if not 0 < top <= 1:
            raise ValueError(f"top must be in (0, 1], got {top!r}")
        for option, value, known in (
            ("to", to, ("zero", "global")),
            ("scope", scope, ("tensor", "global")),
            ("average", average, get_args(Average)),
        ):
            if value not in known:
                raise ValueError(f"{option} must be {' or '.join(map(repr, known))}, got {value!r}")
        self._model = model
        self._names = tuple(
            name
            for name, tensor in named_tensors(model).items()
            if is_parameter(tensor) and tensor.requires_grad
        )
        if not self._names:
            raise ValueError("the model has no parameter that requires grad: add an adapter first")
        self._parameters()
        self.top, self.period, self.to, self.scope = top, period, to, scope
        self.average, self.reset_optimizer, self.aligns = average, reset_optimizer, align
        self.tasks = 0
        """How many tasks the global adapter is made of."""
        self._global: dict[str, Tensor] = {}
        self._threshold: dict[str, Tensor] = {}
        self._steps = 0

    @property
    def global_adapter(self) -> dict[str, Tensor]:
        """g by parameter name, empty before the first task was merged. Not copies."""
        return dict(self._global)

    @torch.no_grad()
    def resume(self, adapter: Mapping[str, Tensor], tasks: int) -> None:
        """Go on from a global adapter that `tasks` tasks were merged into; the live weights become
        it. KeyError or ValueError if it does not fit the model or is not finite: nothing changes.
        """
        if tasks < 1:
            raise ValueError(f"tasks must be at least 1, got {tasks}")
        live = self._live()
        for name in live.keys() | adapter.keys():
            if name not in adapter:
                raise KeyError(f"adapter: tensor {name!r} is missing")
            if name not in live:
                raise KeyError(f"adapter: tensor {name!r} is no trainable parameter of the model")
            if adapter[name].shape != live[name].shape:
                raise ValueError(
                    f"adapter, tensor {name!r}: shape {list(adapter[name].shape)}, "
                    f"the model's is {list(live[name].shape)}"
                )
        self._begin_from({n: adapter[n].to(w, copy=True) for n, w in live.items()}, tasks)
        self._show_global()

    @torch.no_grad()
    def align(self, optimizer: torch.optim.Optimizer | None = None) -> None:
        """To be called after each step of the optimiser; works at every `period`-th call."""
        self._steps += 1
        if not self.aligns or not self._global or self._steps % self.period:
            return
        parameters = self._parameters()
        before = self._live_copy() if self.reset_optimizer and optimizer is not None else {}
        cx.align_(self._live(), self._global, self._threshold, to=self.to)
        if optimizer is None:
            return
        for name, old in before.items():
            parameter = parameters[name]
            put_back = parameter != old  # what conflicts is never what it becomes
            for value in optimizer.state.get(parameter, {}).values():
                if isinstance(value, Tensor) and value.shape == parameter.shape:
                    value.masked_fill_(put_back, 0)

    @torch.no_grad()
    def misaligned(self) -> float | None:
        """Share of all live weights whose sign is opposite to the global adapter's, whatever their
        magnitude; None before the first task was merged. Synchronises."""
        if not self._global:
            return None
        every = {n: torch.zeros((), device=g.device) for n, g in self._global.items()}
        return float(cx.align_(self._live_copy(), self._global, every))

    @torch.no_grad()
    def merge(self) -> float | None:
        """Merge the live adapter into the global one, which the live weights then are; gradients
        are set to None. Returns what `misaligned` was just before.

        ValueError naming the tensor when live weights are not finite: the global adapter is what it
        was.
        """
        share = self.misaligned()
        if self._global:
            tasks = self.tasks + 1
            weight = 0.5 if self.average == "half" else 1 - 1 / tasks
            cx.average_(self._global, self._live(), weight)
            self._begin_from(self._global, tasks)
            self._show_global()
        else:
            self._begin_from(self._live_copy(), 1)
        for parameter in self._parameters().values():
            parameter.grad = None
        return share

    def _begin_from(self, adapter: dict[str, Tensor], tasks: int) -> None:
        threshold = cx.magnitude_threshold(adapter, self.top, self.scope)
        self._global, self._threshold = adapter, threshold
        self.tasks, self._steps = tasks, 0

    def _show_global(self) -> None:
        for name, parameter in self._parameters().items():
            parameter.copy_(self._global[name])

    def _parameters(self) -> dict[str, Tensor]:
        """The live parameters, looked up anew, for they may have been replaced."""
        named = named_tensors(self._model)
        for name in self._names:
            if name not in named:
                raise KeyError(f"the model no longer has tensor {name!r}")
        parameters = {name: named[name] for name in self._names}
        refuse_sharded("model", parameters)
        for name, parameter in parameters.items():
            check_fusable("model", name, parameter)
        return parameters

    def _live(self) -> dict[str, Tensor]:
        return {name: parameter.detach() for name, parameter in self._parameters().items()}

    def _live_copy(self) -> dict[str, Tensor]:
        return {name: parameter.clone() for name, parameter in self._live().items()}
