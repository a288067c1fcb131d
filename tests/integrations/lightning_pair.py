"""Lightning's strategies for several processes, for each of two processes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy
from states import contents
from tiny_module import Fail, TinyModule, absorbed_by_hand, batches, tiny_trainer
from torch import Tensor
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.fsdp import FSDPModule, fully_shard

from condu import ConDU
from condu.integrations.lightning import ConDUCallback

TASKS = ("cars", "food")


def train_replicas(folder: Path) -> dict[str, Any]:
    """Two tasks with DistributedDataParallel, absorbed by the callback and by hand."""
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


class ShardedModule(TinyModule):
    """Its middle layer belongs to the root, which FSDP2 leaves whole after validation."""

    def configure_model(self) -> None:
        if not isinstance(self.net, FSDPModule):  # asked again for each fit
            mesh = self.device_mesh["data_parallel"]
            for part in (self.net[0], self.net[3], self.net):
                fully_shard(part, mesh=mesh)


class KeepWhole(Callback):
    """The whole weights when training has ended."""

    def on_train_end(self, trainer: Any, pl_module: TinyModule) -> None:
        self.weights = whole(pl_module)


def train_shards(folder: Path) -> dict[str, Any]:
    """Two tasks with FSDP2: whole fine-tuned weights and experts, and the state in a folder; before
    them, what is said to a fusion made of the whole module.
    """
    module = ShardedModule()
    too_early = ConDUCallback(TASKS[0], ConDU(module))
    refusal = _refusal(
        lambda: sharded_trainer(folder, too_early).fit(module, batches(0)), ValueError
    )
    fusion = None
    finetuned = {}
    for seed, task in enumerate(TASKS):
        callback, keep = ConDUCallback(task, fusion), KeepWhole()
        sharded_trainer(folder, callback, keep).fit(module, batches(seed), batches(100))
        fusion = callback.fusion
        finetuned[task] = keep.weights
        assert fusion.moved() == ()
    fusion.save_pretrained(folder / "shards")
    experts = {}
    for task in TASKS:
        with fusion.expert(task):
            experts[task] = whole(module)
    return {"refusal": refusal, "finetuned": finetuned, "experts": experts}


def resume_shards(folder: Path) -> dict[bool, dict[str, Tensor]]:
    """A task that fails in its second epoch and is resumed: whole experts, and undisturbed ones."""
    saving, failing = ModelCheckpoint(folder, filename="first"), Fail(RuntimeError, step=3)
    options = {"max_epochs": 2, "enable_checkpointing": True}
    failed = sharded_trainer(folder, saving, failing, **options)
    _refusal(lambda: failed.fit(ShardedModule(), batches(0), batches(100)), RuntimeError)
    experts = {}
    for resumed in True, False:
        module, callback = ShardedModule(), ConDUCallback("cars")
        run = sharded_trainer(folder, callback, max_epochs=2)
        if resumed:
            run.ckpt_path = folder / "first.ckpt"
        run.fit(module, batches(0), batches(100))
        with callback.fusion.expert("cars"):
            experts[resumed] = {n: w for n, w in whole(module).items() if "running" not in n}
    return experts


def sharded_trainer(folder: Path, *callbacks: Callback, **options: Any) -> Trainer:
    strategy = ModelParallelStrategy(data_parallel_size=2, tensor_parallel_size=1)
    return tiny_trainer(folder, *callbacks, strategy=strategy, devices=2, **options)


def _refusal(fit: Callable[[], object], kind: type[Exception]) -> str:
    try:
        fit()
    except kind as error:
        return str(error)
    raise AssertionError("it trained")


def whole(module: TinyModule) -> dict[str, Tensor]:
    """Copies of all weights of a sharded module, gathered on each process."""
    state = get_model_state_dict(module, options=StateDictOptions(full_state_dict=True))
    return {name: value.clone() for name, value in state.items()}
