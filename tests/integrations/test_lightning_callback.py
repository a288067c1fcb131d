"""The callback under the real Lightning Trainer, against the same training absorbed by hand."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import EMAWeightAveraging, ModelCheckpoint
from lightning.pytorch.tuner import Tuner
from states import assert_same, contents, make_up, snapshot
from tiny_module import Fail, TinyModule, absorbed_by_hand, batches, tiny_trainer

from condu import ConDU
from condu.integrations.lightning import ConDUCallback


class Keep(Callback):
    """The weights when training has ended."""

    def on_train_end(self, trainer: Any, pl_module: TinyModule) -> None:
        self.weights = snapshot(pl_module)


@contextmanager
def interrupts_kept() -> Iterator[None]:
    """Lightning ignores further interrupts after the first, for good."""
    handler = signal.getsignal(signal.SIGINT)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, handler)


def test_two_tasks_give_what_absorbing_by_hand_gives(tmp_path: Path) -> None:
    module = TinyModule()
    base = snapshot(module)
    fusion = ConDU(module)
    for seed, task in enumerate(("cars", "food")):
        callback = ConDUCallback(task, fusion)
        tiny_trainer(tmp_path, callback).fit(module, batches(seed), batches(100))
        assert_same(snapshot(module), base)
    assert_same(contents(fusion.state), absorbed_by_hand(tmp_path, "cars", "food"))


def test_without_a_fusion_one_is_made_and_handed_on(tmp_path: Path) -> None:
    module = TinyModule()
    first = ConDUCallback("cars")
    tiny_trainer(tmp_path, first).fit(module, batches(0), batches(100))
    second = ConDUCallback("food", first.fusion)
    tiny_trainer(tmp_path, second).fit(module, batches(1), batches(100))
    assert second.fusion is first.fusion
    assert_same(contents(first.fusion.state), absorbed_by_hand(tmp_path, "cars", "food"))


def test_a_fusion_may_be_of_a_part_of_the_module(tmp_path: Path) -> None:
    module = TinyModule()
    fusion = ConDU(module.net[3])
    tiny_trainer(tmp_path, ConDUCallback("cars", fusion)).fit(module, batches(0))
    assert set(fusion.state.delta) == {"weight", "bias"}
    assert fusion.moved() == ()
    assert not torch.equal(module.net[0].weight, TinyModule().net[0].weight)


def test_the_module_is_left_as_training_alone_leaves_it(tmp_path: Path) -> None:
    alone, module = TinyModule(), TinyModule()
    tiny_trainer(tmp_path).fit(alone, batches(0))
    parameters = list(map(id, module.parameters()))
    callback = ConDUCallback("cars")
    tiny_trainer(tmp_path, callback).fit(module, batches(0))
    with callback.fusion.expert("cars"):
        pass
    assert make_up(module) == make_up(alone)
    assert list(map(id, module.parameters())) == parameters


def test_checkpoints_are_of_the_finetuned_module(tmp_path: Path) -> None:
    keep, callback = Keep(), ConDUCallback("cars")
    module = TinyModule()
    # saves when training ends, and as the last of all callbacks
    saving = ModelCheckpoint(tmp_path, save_last=True, every_n_epochs=100)
    run = tiny_trainer(tmp_path, callback, keep, saving, enable_checkpointing=True)
    run.fit(module, batches(0))
    saved = torch.load(tmp_path / "last.ckpt", weights_only=True)["state_dict"]
    assert_same(saved, keep.weights)

    with callback.fusion.expert("cars"):
        run.save_checkpoint(tmp_path / "expert.ckpt")
        expert = run.test(module, batches(0), verbose=False)
    saved = torch.load(tmp_path / "expert.ckpt", weights_only=True)["state_dict"]
    del saved["net.1.num_batches_tracked"], keep.weights["net.1.num_batches_tracked"]
    torch.testing.assert_close(saved, keep.weights)
    assert callback.fusion.moved() == ()
    assert run.test(module, batches(0), verbose=False)[0]["loss"] > expert[0]["loss"]


def test_averaged_weights_are_what_is_absorbed(tmp_path: Path) -> None:
    module = TinyModule()
    keep, callback = Keep(), ConDUCallback("cars")
    # the order of the list: the fusion's callback comes first, and still absorbs the average
    run = tiny_trainer(tmp_path, callback, EMAWeightAveraging(decay=0.5), keep)
    run.fit(module, batches(0))
    with callback.fusion.expert("cars"):
        for name, parameter in module.named_parameters():
            torch.testing.assert_close(parameter.detach(), keep.weights[name])
    plain = absorbed_by_hand(tmp_path, "cars")
    assert not torch.equal(
        callback.fusion.state.delta["net.0.weight"], plain["unified"]["net.0.weight"]
    )


@pytest.mark.parametrize(
    ("error", "seen"), [(RuntimeError, RuntimeError), (KeyboardInterrupt, SystemExit)]
)
def test_a_fit_that_does_not_end_is_not_absorbed(
    tmp_path: Path, error: type[BaseException], seen: type[BaseException]
) -> None:
    module = TinyModule()
    callback = ConDUCallback("cars")
    with pytest.raises(seen), interrupts_kept():
        tiny_trainer(tmp_path, callback, Fail(error)).fit(module, batches(0))
    assert callback.fusion.tasks == ()
    assert callback.fusion.moved()
    with pytest.warns(UserWarning, match=r"task 'cars' starts from weights .*'net\.0\.weight'"):
        tiny_trainer(tmp_path, callback).fit(module, batches(0))
    assert callback.fusion.tasks == ("cars",)


def test_a_resumed_fit_needs_a_fusion_of_the_pretrained_module(tmp_path: Path) -> None:
    saving = ModelCheckpoint(tmp_path, filename="first")
    failing = tiny_trainer(
        tmp_path, saving, Fail(RuntimeError, step=6), enable_checkpointing=True, max_epochs=2
    )
    with pytest.raises(RuntimeError, match="as planned"):
        failing.fit(TinyModule(), batches(0), batches(100))
    checkpoint = tmp_path / "first.ckpt"

    with pytest.raises(RuntimeError, match="task 'cars': the training resumes from a checkpoint"):
        tiny_trainer(tmp_path, ConDUCallback("cars"), max_epochs=2).fit(
            TinyModule(), batches(0), batches(100), ckpt_path=checkpoint
        )

    module = TinyModule()
    fusion = ConDU(module)
    run = tiny_trainer(tmp_path, ConDUCallback("cars", fusion), max_epochs=2)
    run.fit(module, batches(0), batches(100), ckpt_path=checkpoint)
    assert run.global_step == 8
    assert_same(contents(fusion.state), absorbed_by_hand(tmp_path, "cars", max_epochs=2))


def test_fast_dev_run_absorbs_nothing(tmp_path: Path) -> None:
    module = TinyModule()
    base = snapshot(module)
    callback = ConDUCallback("cars")
    keep = Keep()
    tiny_trainer(tmp_path, callback, keep, fast_dev_run=True).fit(module, batches(0), batches(1))
    assert not torch.equal(keep.weights["net.0.weight"], base["net.0.weight"])
    assert callback.fusion.tasks == ()
    assert_same(snapshot(module), base)
    tiny_trainer(tmp_path, callback).fit(module, batches(0))
    assert callback.fusion.tasks == ("cars",)


def test_a_search_for_the_learning_rate_is_not_absorbed(tmp_path: Path) -> None:
    module = TinyModule()
    fusion = ConDU(module)
    run = tiny_trainer(tmp_path, ConDUCallback("cars", fusion))
    Tuner(run).lr_find(module, batches(0), num_training=3, update_attr=False)
    assert fusion.tasks == ()
    assert fusion.moved() == ()
    run.fit(module, batches(0))
    assert fusion.tasks == ("cars",)


@pytest.mark.parametrize("case", ["task", "module", "frozen"])
def test_bad_use_is_refused_before_the_first_step(tmp_path: Path, case: str) -> None:
    module = TinyModule()
    fusion = ConDU(module)
    callback = ConDUCallback("cars", fusion)
    if case == "task":
        fusion.absorb("cars")
        match = "task 'cars' is already in the state"
    elif case == "module":
        module = TinyModule()
        match = "task 'cars': the fusion's TinyModule is not .* the TinyModule that is trained"
    else:
        module.requires_grad_(False)
        callback = ConDUCallback("cars")
        match = "no trainable floating-point parameter"
    with pytest.raises(ValueError, match=match):
        tiny_trainer(tmp_path, callback, Fail(AssertionError)).fit(module, batches(0))


@pytest.mark.parametrize("strategy", ["ddp_spawn", "ddp_fork"])
def test_processes_that_end_with_fit_are_refused(tmp_path: Path, strategy: str) -> None:
    if strategy == "ddp_fork" and torch.cuda.is_initialized():
        pytest.skip("Lightning does not fork a process that uses CUDA")
    callback = ConDUCallback("cars", ConDU(module := TinyModule()))
    run = tiny_trainer(tmp_path, callback, strategy=strategy, devices=1)
    with pytest.raises(Exception, match="task 'cars': the training runs in a process of its own"):
        run.fit(module, batches(0))
