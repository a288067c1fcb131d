"""The callback under the real Trainer, against the same training absorbed by hand."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from states import assert_same, contents, make_up, snapshot
from tiny_clip import absorbed_by_hand, tiny_clip, trainer
from torch import Tensor, nn
from transformers import TrainerCallback, TrainerState
from transformers.trainer_jit_checkpoint import JITCheckpointCallback

from condu import ConDU
from condu.integrations.transformers import ConDUCallback


class At(TrainerCallback):
    """Runs an action when a step has ended, at ``step`` alone."""

    def __init__(self, step: int, action: Any) -> None:
        self.step, self.action = step, action

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self.step:
            self.action(control, kwargs["model"])


def stop(control: Any, model: nn.Module) -> None:
    control.should_training_stop = True


@pytest.mark.parametrize("arguments", [{}, {"gradient_accumulation_steps": 2, "bf16": True}])
def test_two_tasks_give_what_absorbing_by_hand_gives(
    tmp_path: Path, arguments: dict[str, Any]
) -> None:
    model = tiny_clip()
    base = snapshot(model)
    fusion = ConDU(model)
    for seed, task in enumerate(("cars", "food")):
        trainer(model, tmp_path, seed, ConDUCallback(task, fusion), **arguments).train()
        assert_same(snapshot(model), base)
    expected = absorbed_by_hand(tiny_clip(), tmp_path, "cars", "food", **arguments)
    assert_same(contents(fusion.state), expected)


def test_without_a_fusion_one_is_made_and_handed_on(tmp_path: Path) -> None:
    model = tiny_clip()
    first = ConDUCallback("cars")
    with pytest.raises(RuntimeError, match="task 'cars': there is no fusion yet"):
        _ = first.fusion
    trainer(model, tmp_path, 0, first).train()
    assert first.fusion.model is model
    second = ConDUCallback("food", first.fusion)
    trainer(model, tmp_path, 1, second).train()
    assert second.fusion is first.fusion
    assert first.fusion.tasks == ("cars", "food")


def test_the_model_is_left_as_training_alone_leaves_it(tmp_path: Path) -> None:
    alone, model = tiny_clip(), tiny_clip()
    trainer(alone, tmp_path, 0).train()
    parameters = list(map(id, model.parameters()))
    callback = ConDUCallback("cars")
    trainer(model, tmp_path, 0, callback).train()
    with callback.fusion.expert("cars"):
        pass
    assert make_up(model) == make_up(alone)
    assert list(map(id, model.parameters())) == parameters


def test_an_expert_block_saves_what_was_trained(tmp_path: Path) -> None:
    model = tiny_clip()
    finetuned = {}
    callback = ConDUCallback("cars")
    remember = At(3, lambda control, model: finetuned.update(snapshot(model)))
    run = trainer(model, tmp_path, 0, callback, remember)
    run.train()
    with callback.fusion.expert("cars"):
        run.save_model(str(tmp_path / "cars"))
    saved = type(model).from_pretrained(tmp_path / "cars").state_dict()
    torch.testing.assert_close(dict(saved), finetuned)
    assert callback.fusion.moved() == ()


def test_the_best_model_is_absorbed_where_it_is_loaded_at_the_end(tmp_path: Path) -> None:
    steps: list[dict[str, Tensor]] = []
    keep = [At(step, lambda control, model: steps.append(snapshot(model))) for step in (1, 2, 3)]
    callback = ConDUCallback("cars")
    run = trainer(
        tiny_clip(),
        tmp_path,
        0,
        callback,
        *keep,
        learning_rate=0.3,  # too high: the loss grows
        prediction_loss_only=True,
        eval_strategy="steps",
        eval_steps=1,
        save_strategy="steps",
        save_steps=1,
        load_best_model_at_end=True,
        metric_for_best_model="loss",
    )
    run.train()
    assert run.state.best_global_step in (1, 2)
    fusion = ConDU(model := tiny_clip())
    model.load_state_dict(steps[run.state.best_global_step - 1])
    fusion.absorb("cars")
    assert_same(contents(callback.fusion.state), contents(fusion.state))


def test_an_interrupted_training_is_not_absorbed_and_can_be_resumed(tmp_path: Path) -> None:
    def fail(control: Any, model: nn.Module) -> None:
        raise KeyboardInterrupt

    checkpoints = {"save_strategy": "steps", "save_steps": 1}
    model = tiny_clip()
    fusion = ConDU(model)
    with pytest.raises(KeyboardInterrupt):
        trainer(
            model, tmp_path, 0, ConDUCallback("cars", fusion), At(2, fail), **checkpoints
        ).train()
    assert fusion.tasks == ()
    assert fusion.moved()

    with pytest.raises(RuntimeError, match=r"'cars': .*resumes .*give fusion=ConDU\(model\)"):
        trainer(tiny_clip(), tmp_path, 0, ConDUCallback("cars"), **checkpoints).train(
            resume_from_checkpoint=True
        )

    model = tiny_clip()  # as a new process would have it
    fusion = ConDU(model)
    run = trainer(model, tmp_path, 0, ConDUCallback("cars", fusion), **checkpoints)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*starts from weights")
        run.train(resume_from_checkpoint=True)
    assert run.state.global_step == 3
    assert_same(contents(fusion.state), absorbed_by_hand(tiny_clip(), tmp_path, "cars"))


def test_training_that_stops_early_is_absorbed_unless_it_may_be_resumed(tmp_path: Path) -> None:
    early = ConDUCallback("early")
    trainer(tiny_clip(), tmp_path, 0, early, At(1, stop)).train()
    assert early.fusion.tasks == ("early",)

    whole = ConDUCallback("whole")
    trainer(tiny_clip(), tmp_path, 0, whole, enable_jit_checkpoint=True).train()
    assert whole.fusion.tasks == ("whole",)

    cut = ConDUCallback("cut")
    run = trainer(tiny_clip(), tmp_path, 0, cut, enable_jit_checkpoint=True)
    (jit,) = (c for c in run.callback_handler.callbacks if isinstance(c, JITCheckpointCallback))

    def terminated(control: Any, model: nn.Module) -> None:
        jit.jit_manager.is_checkpoint_requested = True

    run.add_callback(At(1, terminated))
    with pytest.warns(UserWarning, match="task 'cut' is not absorbed: .* at step 2 of 3"):
        run.train()
    assert (tmp_path / "checkpoint-1").is_dir()
    assert cut.fusion.tasks == ()
    assert cut.fusion.moved()


def test_adapters(tmp_path: Path) -> None:
    def adapted() -> nn.Module:
        torch.manual_seed(0)
        return get_peft_model(tiny_clip(), LoraConfig(r=2, target_modules=["fc1", "fc2"]))

    model = adapted()
    callback = ConDUCallback("cars")
    trainer(model, tmp_path, 0, callback, learning_rate=0.1).train()
    assert all("lora_" in name for name in callback.fusion.state.delta)

    expected = absorbed_by_hand(adapted(), tmp_path, "cars", learning_rate=0.1)
    assert_same(contents(callback.fusion.state), expected)


@pytest.mark.parametrize("case", ["task", "model", "model_init", "search", "frozen"])
def test_bad_use_is_refused_before_the_first_step(tmp_path: Path, case: str) -> None:
    model = tiny_clip()
    fusion = ConDU(model)
    callback = ConDUCallback("cars", fusion)
    first = At(1, lambda control, model: pytest.fail("it trained"))
    error: type[Exception] = ValueError
    if case == "task":
        fusion.absorb("cars")
        match = "task 'cars' is already in the state"
        run = trainer(model, tmp_path, 0, callback, first)
    elif case == "model":
        match = "task 'cars': the fusion's CLIPModel is not .* the CLIPModel that is trained"
        run = trainer(tiny_clip(), tmp_path, 0, callback, first)
    elif case == "model_init":
        match = "task 'cars': the fusion's CLIPModel is not"
        run = trainer(None, tmp_path, 0, callback, first, model_init=lambda: tiny_clip())
    elif case == "search":
        error, match = RuntimeError, "task 'cars': a hyperparameter search"
        run = trainer(model, tmp_path, 0, callback, first)
        state = TrainerState(is_hyper_param_search=True)
        with pytest.raises(error, match=match):
            callback.on_train_begin(run.args, state, run.control, model=model)
        return
    else:
        match = "no trainable floating-point parameter"
        run = trainer(model.requires_grad_(False), tmp_path, 0, ConDUCallback("cars"), first)
    with pytest.raises(error, match=match):
        run.train()
