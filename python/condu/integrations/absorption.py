"""A task that is fine-tuned by somebody else's training loop: checked first, absorbed last."""

from __future__ import annotations

import os
import warnings

from torch import nn

from condu.fusion import ConDU
from condu_ext.unified import check_task_name


class TaskAbsorption:
    """What the callbacks of all libraries share.

    Args:
        task: name of the task that the training learns.
        fusion: the ``ConDU`` of the model, or of a part of it. None: it is made of the whole model
            when the training begins, and handed to the next task's callback as ``.fusion``.

    Raises:
        ValueError: ``task`` is no name. TypeError: ``fusion`` is no ``ConDU``.
    """

    def __init__(self, task: str, fusion: ConDU | None = None) -> None:
        if fusion is not None and not isinstance(fusion, ConDU):
            raise TypeError(f"fusion must be a ConDU, got {type(fusion).__name__}")
        self.task = check_task_name(task)
        self._fusion = fusion
        self._process = os.getpid()
        self._begun = False

    @property
    def fusion(self) -> ConDU:
        """The model's ``ConDU``; RuntimeError before the training that makes it has begun."""
        if self._fusion is None:
            raise RuntimeError(
                f"task {self.task!r}: there is no fusion yet; it is made when the training begins"
            )
        return self._fusion

    def begin(self, model: nn.Module, *, resumed: bool) -> None:
        """Check that the task can be absorbed after this training of ``model``; all processes.

        Args:
            resumed: the model already holds weights of a checkpoint of this training.

        Raises:
            RuntimeError: θ_0 cannot be known or the result would be lost. ValueError: the fusion is
            of another model. And what ``ConDU.check_new_task`` raises.
        """
        if os.getpid() != self._process:  # forked
            raise self._process_of_its_own()
        if self._fusion is None:
            if resumed:
                raise RuntimeError(
                    f"task {self.task!r}: the training resumes from a checkpoint, so the model no"
                    " longer holds the pretrained weights: give fusion=ConDU(model), made before"
                )
            self._fusion = ConDU(model)
        trained = {id(parameter) for parameter in model.parameters()}
        if any(id(parameter) not in trained for parameter in self._fusion.model.parameters()):
            raise ValueError(
                f"task {self.task!r}: the fusion's {type(self._fusion.model).__name__} is not (a"
                f" part of) the {type(model).__name__} that is trained: one fusion goes with one"
                " model object, from the first task to the last"
            )
        self._fusion.check_new_task(self.task)
        if not resumed and (moved := self._fusion.moved()):
            warnings.warn(
                f"task {self.task!r} starts from weights that are not the pretrained ones"
                f" ({moved[0]!r} and {len(moved) - 1} more differ); fusion.reset() returns to them",
                stacklevel=2,
            )
        self._begun = True

    def end(self) -> None:
        """Absorb the live weights, once; the model is at θ_0 again."""
        if self._begun:
            # parameters that were unfrozen on the way have no θ_0
            self.fusion.check_new_task(self.task)
            self.fusion.absorb(self.task)
            self._begun = False

    def __getstate__(self) -> object:
        """RuntimeError: a callback is pickled for a process that is spawned."""
        raise self._process_of_its_own()

    def _process_of_its_own(self) -> RuntimeError:
        return RuntimeError(
            f"task {self.task!r}: the training runs in a process of its own, which would take the"
            " absorbed task with it when it ends; start the whole script once for each process"
            " (torchrun, accelerate launch, Lightning's strategy='ddp')"
        )
