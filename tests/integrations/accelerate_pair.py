"""A training loop with accelerate, for each of two processes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from states import contents, snapshot
from torch import nn

from condu import ConDU

TASKS = ("cars", "food")


def small_model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 33), nn.GELU(), nn.Linear(33, 3))


def train(folder: Path) -> dict[str, Any]:
    """Two tasks, absorbed into a fusion of the bare and one of the prepared model."""
    accelerator = Accelerator(cpu=True)
    bare = small_model()
    of_bare = ConDU(bare)
    model = accelerator.prepare(bare)
    of_prepared = ConDU(model)
    finetuned = {}
    for seed, task in enumerate(TASKS):
        optimizer = accelerator.prepare(torch.optim.AdamW(model.parameters(), lr=1e-2))
        torch.manual_seed(10 * seed + accelerator.process_index)  # every process has its own data
        for _ in range(3):
            optimizer.zero_grad()
            accelerator.backward(model(torch.randn(8, 6)).square().mean())
            optimizer.step()
        finetuned[task] = snapshot(accelerator.unwrap_model(model))
        of_prepared.absorb(task)
        bare.load_state_dict(finetuned[task])
        of_bare.absorb(task)
    if accelerator.is_main_process:
        of_prepared.save_pretrained(folder / "fused")
    accelerator.wait_for_everyone()
    return {
        "bare": contents(of_bare.state),
        "prepared": contents(of_prepared.state),
        "saved": contents(ConDU.from_pretrained(folder / "fused", bare).state),
        "finetuned": finetuned,
        "wrapper": type(model).__name__,
    }
