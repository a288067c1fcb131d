"""ConDU as a callback of the Hugging Face ``Trainer``."""

from __future__ import annotations

import warnings
from typing import Any

from condu.integrations.absorption import TaskAbsorption

try:
    from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
except ModuleNotFoundError as error:
    raise ModuleNotFoundError(
        f"condu.integrations.transformers needs the package transformers ({error}):"
        " pip install transformers accelerate",
        name=error.name,
    ) from error


class ConDUCallback(TaskAbsorption, TrainerCallback):
    """Absorbs the live weights at the end of training; nothing goes through a disk.

    One callback and one ``Trainer`` (so a new optimiser) for each task, one ``fusion`` for all::

        fusion = ConDU(model)
        for task, dataset in datasets.items():
            callbacks = [ConDUCallback(task, fusion)]
            trainer = Trainer(model, args, train_dataset=dataset, callbacks=callbacks)
            trainer.train()
        with fusion.expert("cars"):
            trainer.save_model("cars")

    ``ConDUCallback(task)`` alone makes ``.fusion`` of the model when training begins. After
    training the model holds the pretrained weights again, so ``save_model``, ``evaluate`` and
    ``push_to_hub`` for the task belong in an ``expert`` block; checkpoints that the ``Trainer``
    writes on the way are the fine-tuned model's.

    With ``load_best_model_at_end`` the best model is absorbed. A training that raises is not, nor
    is one that ``enable_jit_checkpoint`` may have cut short (a warning says so). To resume from a
    checkpoint, give a ``fusion`` that was made of the pretrained model. All processes absorb; one
    calls ``fusion.save_pretrained``, or all if the model is sharded. For a model that the
    ``Trainer`` itself shards, leave ``fusion`` out: one made before knows the whole tensors only.

    Raises, before the first step: RuntimeError in a hyperparameter search, and what
    ``TaskAbsorption.begin`` raises.
    """

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if state.is_hyper_param_search:
            raise RuntimeError(
                f"task {self.task!r}: a hyperparameter search would absorb each of its trials;"
                " search first, then train with this callback"
            )
        self.begin(kwargs["model"], resumed=state.global_step > 0)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if getattr(args, "enable_jit_checkpoint", False) and state.global_step < state.max_steps:
            warnings.warn(
                f"task {self.task!r} is not absorbed: training stopped at step {state.global_step}"
                f" of {state.max_steps}, perhaps to be resumed from its just-in-time checkpoint;"
                " if it was complete, call fusion.absorb",
                stacklevel=2,
            )
            return
        self.end()
