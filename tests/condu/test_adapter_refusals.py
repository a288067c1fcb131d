"""Adapter folders that cannot be absorbed, and what a refusal leaves behind."""

from __future__ import annotations

import fcntl
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from saved_adapters import absorbed, change, condu, files, refused, save_tasks

import condu_ext as cx
from condu.adapters import absorb_adapter


@pytest.fixture(autouse=True)
def _here(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)


def recast(folder: str, dtype: torch.dtype) -> None:
    path = f"{folder}/adapter_model.safetensors"
    save_file({name: tensor.to(dtype) for name, tensor in load_file(path).items()}, path)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda: shutil.rmtree("b"), "b holds no adapter"),
        (lambda: Path("b/adapter_model.safetensors").rename("b/adapter_model.bin"), "is a pickle"),
        (lambda: Path("b/adapter_model.safetensors").write_bytes(b"x" * 99), "adapter_model"),
        (lambda: Path("b/adapter_config.json").write_text("{"), "adapter_config.json"),
        (lambda: change("b", use_dora=True), "use_dora"),
        (lambda: change("b", peft_type="IA3"), "IA3"),
        (lambda: change("b", init_lora_weights="pissa_niter_4"), "'pissa_niter_4' changes"),
        (lambda: change("b", target_parameters=["experts.w"]), "['experts.w'] adapts"),
        (lambda: save_file({}, "b/adapter_model.safetensors"), "holds no tensor"),
        (lambda: recast("b", torch.int8), "is torch.int8, a factor is floating point"),
        (lambda: (shutil.rmtree("b"), shutil.copytree("start", "b")), "B·A is zero"),
        (lambda: change("b", r=3), "has shape (4, 16), by adapter_config.json it is (3, 16)"),
        (lambda: change("b", base_model_name_or_path="other/base"), "'other/base'"),
    ],
)
def test_a_bad_folder_is_named_and_the_state_stays(damage: Any, message: str) -> None:
    save_tasks("clip mlp")
    change("a", base_model_name_or_path="one/base")
    absorbed("a")
    before = files("state")
    damage()
    assert message in refused("absorb-adapter", "state", "b", "--task", "b")
    assert files("state") == before
    present_before = set(Path().iterdir())
    if "other/base" not in message:
        for new in ("new", "deep/down/new"):
            assert message in refused("absorb-adapter", new, "b", "--task", "b")
    assert set(Path().iterdir()) == present_before  # no folder, no lock


@pytest.mark.parametrize("init", [None, "start"])
def test_adapters_that_do_not_fit_the_state(init: str | None) -> None:
    save_tasks("clip mlp")
    absorbed("a", init=init)
    before = files("state")
    option = [] if init is None else ["--init", init]

    def refused_b(*options: str) -> str:
        return refused("absorb-adapter", "state", "b", "--task", "b", *(options or option))

    assert "task 'a' is already" in refused("absorb-adapter", "state", "b", "--task", "a", *option)
    shutil.copytree("start", "first")
    if init is None:
        assert "leave init out" in refused_b("--init", "start")
    else:
        assert "init must name" in refused("absorb-adapter", "state", "b", "--task", "b")
        save_tasks("clip mlp", "b", seed=5)  # consistent with its own start, not with the state's
        assert "differs from the base model" in refused_b()
        shutil.rmtree("start")
        shutil.copytree("first", "start")
        change("b", lora_alpha=7)
        assert "scale 3.5 of" in refused_b()
    save_tasks("clip mlp", "b", target_modules=["c_fc"])
    assert "other target_modules" in refused_b(*([] if init is None else ["--init", "first"]))
    save_tasks("clip mlp", "b", r=5)
    if init is None:  # products know no rank
        assert condu("absorb-adapter", "state", "b", "--task", "b").exit_code == 0
        return
    assert "(5, 16), but in first (4, 16): another rank" in refused_b("--init", "first")
    assert files("state") == before


def test_the_start_is_no_task() -> None:
    save_tasks("clip mlp")
    absorbed("a", init="start")
    before = files("state")
    line = refused("absorb-adapter", "state", "start", "--task", "b", "--init", "start")
    assert "start was not trained: all tensors are those of start" in line
    line = refused("absorb-adapter", "state", "b", "--task", "b", "--init", "b")
    assert "differs from the base model" in line
    line = refused("absorb-adapter", "new", "b", "--task", "b", "--init", "b")
    assert "b was not trained: all tensors are those of b" in line
    assert files("state") == before


def test_factors_of_64_bits_are_refused_in_one_line() -> None:
    save_tasks("clip mlp")
    recast("start", torch.float64)
    recast("b", torch.float64)
    assert "float64" in refused("absorb-adapter", "new", "b", "--task", "b", "--init", "start")


@pytest.mark.parametrize(
    ("kind", "options", "message"),
    [
        ("convolutions", {"target_modules": ["embed"]}, "layer 'embed' is an embedding"),
        ("fan-in-fan-out", {}, "layer 'transformer.h.0.attn.c_attn' is a Conv1D"),
        ("fan-in-fan-out", {"target_modules": ["attn.c_proj"]}, "attn.c_proj' is a Conv1D"),
    ],
)
def test_products_of_transposed_weights_are_refused(kind: str, options: Any, message: str) -> None:
    save_tasks(kind, "a", **options)
    assert message in refused("absorb-adapter", "new", "a", "--task", "a")


def test_a_checkpoint_is_absorbed_into_by_one_at_a_time() -> None:
    save_tasks("clip mlp")
    with open(".state.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        line = refused("absorb-adapter", "state", "a", "--task", "a")
        assert ".state.lock is locked: another process is absorbing into state" in line
        absorb_adapter("other", "a", "a")  # beside it
    assert absorbed("a").tasks == ("a",)


def test_of_adapters_absorbed_at_once_none_is_lost_silently() -> None:
    save_tasks("clip mlp", "abcd")

    def absorb(task: str) -> str | None:
        try:
            absorb_adapter("state", task, task)
        except RuntimeError as error:
            if "is locked" not in str(error):
                raise
            return None
        return task

    with ThreadPoolExecutor(4) as pool:
        done = set(pool.map(absorb, "abcd")) - {None}
    assert done
    assert set(cx.UnifiedDelta.load("state").tasks) == done
