"""ConDU: fine-tune each task from θ_0, absorb its delta model into the unified model, decouple.

Enhanced Continual Learning of Vision-Language Models with Model Fusion, arXiv 2503.10705.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

import torch

from condu.fusion import ConDU
from condu.methods.base import Method, Seconds, register
from condu.prototypes import PrototypeSet
from condu.workspace import Workspace

if TYPE_CHECKING:
    from condu.evaluation import Protocol


@register
class ConDUFineTuning(Method):
    """`task-id`: a seen task is answered by its decoupled expert, an unseen one by semantic voting.
    `agnostic`: every dataset by semantic voting."""

    name: ClassVar[str] = "condu"

    def __init__(self, workspace: Workspace) -> None:
        super().__init__(workspace)
        config = workspace.config
        if (self._state / "config.json").exists():  # its commit point, written last
            self.fusion = ConDU.from_pretrained(self._state, workspace.clip.model)
        else:
            self.fusion = ConDU(
                workspace.clip.model,
                rule=config.fusion.rule(),
                state_dtype=getattr(torch, config.fusion.state_dtype),
            )
        self.prototypes = (
            PrototypeSet.load(self._prototype_file)
            if self._prototype_file.exists()
            else PrototypeSet()
        )
        self.voting = config.voting.voting()

    def learn(self, index: int) -> Seconds:
        workspace = self.workspace
        finetuned = workspace.finetune(index)
        if not workspace.accelerator.is_main_process:
            return Seconds(train=finetuned.seconds)
        task = workspace.benchmark.tasks[index]
        fuse = 0.0
        if task.name not in self.fusion.tasks:
            workspace.clip.model.load_state_dict(finetuned.load())
            began = time.perf_counter()
            self.fusion.absorb(task.name)  # and puts θ_0 back into the live model
            fuse = time.perf_counter() - began
            self.fusion.save_pretrained(self._state)
        began = time.perf_counter()
        if task.name not in self.prototypes:
            workspace.evaluator.add_prototypes(self.prototypes, task, self.fusion)
            self.prototypes.save(self._prototype_file)
        evaluate = time.perf_counter() - began
        return Seconds(train=finetuned.seconds, fuse=fuse, evaluate=evaluate)

    def rows(self, index: int, protocols: Sequence[Protocol]) -> dict[Protocol, list[float]]:
        rows = self.workspace.evaluator.fused_rows(
            self.fusion, self.prototypes, self.voting, protocols=protocols
        )
        return {protocol: list(row.accuracy) for protocol, row in rows.items()}

    @property
    def _state(self) -> Path:
        return self.workspace.folder / self.name / "state"

    @property
    def _prototype_file(self) -> Path:
        return self.workspace.folder / self.name / "prototypes.safetensors"
