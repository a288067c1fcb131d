"""Lightning's strategies for several processes, for each of two processes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lightning.pytorch.strategies import DDPStrategy
from states import contents
from tiny_module import TinyModule, absorbed_by_hand, batches, tiny_trainer

from condu.integrations.lightning import ConDUCallback

TASKS = ("cars", "food")


def train_on_two(folder: Path) -> dict[str, Any]:
    """Two tasks, absorbed by the callback and by hand."""
    module = TinyModule()
    fusion = None
    for seed, task in enumerate(TASKS):
        callback = ConDUCallback(task, fusion)
        run = tiny_trainer(folder, callback, strategy="ddp", devices=2)
        run.fit(module, batches(seed), batches(100))
        fusion = callback.fusion
    assert isinstance(run.strategy, DDPStrategy)
    by_hand = absorbed_by_hand(folder, *TASKS, strategy="ddp", devices=2)
    return {"callback": contents(fusion.state), "by hand": by_hand}
