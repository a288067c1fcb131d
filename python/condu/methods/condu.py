"""ConDU: fine-tune each task from θ_0, absorb its delta model into the unified model, decouple.

Enhanced Continual Learning of Vision-Language Models with Model Fusion, arXiv 2503.10705.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

import torch

from condu.evaluation import Evaluator, Row
from condu.fusion import ConDU
from condu.live import canonical_name
from condu.methods.base import Method, register
from condu.reconstruction import Fused, reconstruct
from condu.record import Learned
from condu.workspace import Tuning, Workspace

if TYPE_CHECKING:
    from condu.evaluation import Protocol


@register
class ConDUFineTuning(Method):
    """`task-id`: a seen task is answered by its decoupled expert, an unseen one by semantic voting.
    `agnostic` and the unions: every data set by semantic voting.

    A model that cannot vote, having no features of images and texts that could be compared, has
    the protocol `task-id` alone, and answers an unseen task as the pretrained model does.
    """

    name: ClassVar[str] = "condu"

    def __init__(self, workspace: Workspace) -> None:
        super().__init__(workspace)
        config, model = workspace.config, self.tuner.live.model
        if (self._state / "config.json").exists():  # its commit point, written last
            self.fusion = ConDU.from_pretrained(self._state, model)
        else:
            self.fusion = ConDU(
                model,
                rule=config.fusion.rule(),
                state_dtype=getattr(torch, config.fusion.state_dtype),
            )
        if not workspace.live.votes:
            self.protocols = ("task-id",)

    def learn(self, index: int) -> Learned:
        workspace = self.workspace
        finetuned = self.tuner.finetune(index)
        if not workspace.accelerator.is_main_process:
            return Learned.by(finetuned)
        began = time.perf_counter()
        if workspace.live.votes:  # first, for they take longer to be made again after a kill
            workspace.add_prototypes(workspace.benchmark.tasks[index], self.fusion)
        evaluate = time.perf_counter() - began
        return Learned.by(finetuned, fuse=self.fuse(index), evaluate=evaluate)

    def fuse(self, index: int) -> float:
        """Bring a fine-tuned task into the unified model, unless it is there; returns the seconds
        that took without reading and writing files."""
        task = self.workspace.benchmark.tasks[index].name
        if task in self.fusion.tasks:
            return 0.0
        self.tuner.put(self.tuner.finetuned(index))
        began = time.perf_counter()
        self.fusion.absorb(task)  # and puts θ_0 back into the live model
        seconds = time.perf_counter() - began
        self.fusion.save_pretrained(self._state)
        return seconds

    def name_of(self) -> Callable[[str], str]:
        """What turns the names in files of the fine-tuned models into those of the state."""
        return canonical_name

    def rows(self, index: int, protocols: Sequence[Protocol]) -> dict[Protocol, Row]:
        scorer = self.tuner.scorer
        if not isinstance(scorer, Evaluator):
            return {"task-id": Row(self._row_by_task())}
        return scorer.fused_rows(
            self.fusion,
            self.workspace.prototypes,
            self.workspace.config.voting.voting(),
            protocols=protocols,
        )

    def _row_by_task(self) -> list[float]:
        row = []
        for index, task in enumerate(self.workspace.benchmark):
            if task.name in self.fusion.tasks:
                with self.fusion.expert(task.name):
                    row.append(self.tuner.scorer.accuracy(task))
            else:
                row.append(self.workspace.zero_shot_accuracy(index))
        return row

    def fused(self, index: int) -> Fused:
        """Tasks 0 … `index` in the unified model, held against their fine-tuned models on disk."""
        fusion, tasks = self.fusion, self.workspace.benchmark.tasks[: index + 1]
        return Fused(
            fusion.state.nbytes,
            {
                task.name: reconstruct(
                    fusion.state,
                    task.name,
                    fusion.pretrained,
                    self.tuner.finetuned(position).path,
                    self.name_of(),
                )
                for position, task in enumerate(tasks)
            },
        )

    @property
    def _state(self) -> Path:
        return self.folder / "state"


@register
class ConDULoRA(ConDUFineTuning):
    """The same over adapters: their factors A and B are unified element by element, as the paper
    does it, from the initialisation that all tasks share."""

    name: ClassVar[str] = "condu_lora"
    tuning: ClassVar[Tuning] = "lora"

    def name_of(self) -> Callable[[str], str]:
        from condu.adapters.layers import LoraLayers  # imports peft

        return LoraLayers(self.tuner.live.model).namer()
