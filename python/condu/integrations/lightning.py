"""ConDU as a callback of the Lightning ``Trainer``."""

from __future__ import annotations

from condu.integrations.absorption import TaskAbsorption

try:
    from lightning.pytorch import Callback, LightningModule, Trainer
except ModuleNotFoundError as error:
    raise ModuleNotFoundError(
        f"condu.integrations.lightning needs the package lightning ({error}):"
        " pip install lightning",
        name=error.name,
    ) from error


class ConDUCallback(TaskAbsorption, Callback):
    """Absorbs the live weights at the end of ``fit``; nothing goes through a disk.

    One callback and one ``Trainer`` for each task, one ``fusion`` for all::

        fusion = ConDU(module)
        for task, loader in loaders.items():
            trainer = Trainer(max_epochs=1, callbacks=[ConDUCallback(task, fusion)])
            trainer.fit(module, loader)
        with fusion.expert("cars"):
            trainer.test(module, test_loader)

    ``ConDUCallback(task)`` alone makes ``.fusion`` of the module when ``fit`` begins, as it must be
    for a module that its strategy shards or that ``configure_model`` builds. After ``fit`` the
    module holds the pretrained weights again, so ``save_checkpoint``, ``test`` and ``predict`` for
    the task belong in an ``expert`` block; checkpoints that callbacks write until training ends are
    the fine-tuned model's, and what an averaging callback writes then is absorbed.

    A ``fit`` that raises or is interrupted is not absorbed; ``fast_dev_run`` is not either, and
    returns the module to θ_0. To resume from ``ckpt_path``, give a ``fusion`` that was made of the
    pretrained module.

    All processes absorb; one calls ``fusion.save_pretrained``, all if the module is sharded
    (FSDP2, ``ModelParallelStrategy``). BatchNorm's statistics are each process's own.

    Raises, before the first step: what ``TaskAbsorption.begin`` raises; so for
    ``strategy="ddp_spawn"``, whose processes take the result with them.
    """

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # strategies that shard restore weights only after this hook
        restored = not trainer.strategy.restore_checkpoint_after_setup
        self.begin(pl_module, resumed=restored and trainer.ckpt_path is not None)

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # on_train_end is too early: there averages are written and ModelCheckpoint still saves
        if trainer.fast_dev_run:  # type: ignore[attr-defined]
            self.fusion.reset()
        else:
            self.end()
