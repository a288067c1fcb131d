"""Which fine-tuned checkpoints fit a base, and what is said of those that do not."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from range_models import assert_same, load, model, moved, save
from runs import contents
from torch import Tensor

import condu_ext as cx
from condu import checkpoint
from condu.checkpoint import Options
from condu_ext.manifest import read_manifest

Change = Callable[[dict[str, Tensor]], object]


def grown(tensors: dict[str, Tensor]) -> None:
    """A vocabulary with three more words."""
    tensors["matrix"] = torch.cat([tensors["matrix"], torch.ones(3, 41)])


def unify(folder: Path, change: Change, **options: object) -> tuple[dict[str, Tensor], list[str]]:
    """Unify two fine-tuned models, of which the second was changed; the base and the reports."""
    lines: list[str] = []
    base = model(0)
    tasks = {"a": moved(base, 1), "b": moved(base, 2)}
    change(tasks["b"])
    files = {task: save(m, folder / f"{task}.safetensors") for task, m in tasks.items()}
    checkpoint.unify(
        save(base, folder / "base.safetensors"),
        files,
        folder / "state",
        options=Options(report=lines.append, **options),  # type: ignore[arg-type]
    )
    return base, lines


@pytest.mark.parametrize(
    ("change", "kind", "message"),
    [
        (grown, ValueError, r"task 'b', tensor 'matrix': shape \(303, 41\), the base's is \(300"),
        (lambda m: m.pop("bias"), KeyError, "task 'b': tensor 'bias' is missing"),
        (
            lambda m: m.update(extra=torch.ones(2)),
            ValueError,
            r"task 'b': tensor 'extra' \(2,\) is not in the base",
        ),
        (
            lambda m: m.update(bias=m["bias"].double()),
            TypeError,
            "task 'b', tensor 'bias': torch.float64 cannot be fused",
        ),
        (
            lambda m: m.update(bias=m["bias"].to(torch.float8_e4m3fn)),
            TypeError,
            "task 'b', tensor 'bias': torch.float8_e4m3fn cannot be fused",
        ),
        (
            lambda m: m.update(steps=torch.arange(1, 6)),
            ValueError,
            "task 'b': integer tensor 'steps' .* differs from the base's",
        ),
        (
            lambda m: m["wide"].view(-1)[150_000].fill_(torch.nan),
            ValueError,
            "task 'b', tensor 'wide': .* NaN or infinite",
        ),
        (
            lambda m: m["scalar"].fill_(torch.inf),
            ValueError,
            "task 'b', tensor 'scalar': .* NaN or infinite",
        ),
    ],
)
def test_what_does_not_fit_is_refused_by_name(
    tmp_path: Path, change: Change, kind: type[Exception], message: str
) -> None:
    with pytest.raises(kind, match=message):
        unify(tmp_path, change)
    assert {p.name for p in tmp_path.iterdir()} == {
        "a.safetensors",
        "b.safetensors",
        "base.safetensors",
    }


def test_skipped_tensors_count_as_not_fine_tuned(tmp_path: Path) -> None:
    def change(tensors: dict[str, Tensor]) -> None:
        grown(tensors)
        del tensors["bias"]
        tensors["extra"] = torch.ones(2)

    base, lines = unify(tmp_path, change, on_mismatch="skip")
    assert [line.partition("tensor ")[2].split()[0].strip(":'") for line in lines] == [
        "bias",
        "matrix",
        "extra",
    ]
    assert all("task 'b'" in line and "taken as not fine-tuned" in line for line in lines)
    tasks = {"a": moved(base, 1), "b": moved(base, 2)}
    tasks["b"]["bias"], tasks["b"]["matrix"] = base["bias"], base["matrix"]
    expected = cx.unify(tasks, base)
    expected.record_base(base)
    assert_same(tmp_path / "state", expected)


def test_nan_in_the_base_is_found(tmp_path: Path) -> None:
    base = model(0)
    tuned = save(moved(base, 1), tmp_path / "a.safetensors")
    base["matrix"][7, 7] = torch.nan
    with pytest.raises(ValueError, match="task 'a', tensor 'matrix': the model or its difference"):
        checkpoint.unify(
            save(base, tmp_path / "base.safetensors"), {"a": tuned}, tmp_path / "state"
        )
    assert not (tmp_path / "state").exists()


@pytest.fixture
def state(tmp_path: Path) -> Path:
    base = model(0)
    where = save(base, tmp_path / "base.safetensors")
    tuned = save(moved(base, 1), tmp_path / "a.safetensors")
    checkpoint.unify(where, {"a": tuned}, tmp_path / "state")
    return tmp_path / "state"


def test_another_base_is_refused(tmp_path: Path, state: Path) -> None:
    other = model(0)
    other["matrix"][5, 5] += 1
    where = save(other, tmp_path / "other.safetensors")
    before = contents(state)
    match = "other.safetensors, tensor 'matrix': differs from the base model that the state"
    with pytest.raises(ValueError, match=match):
        checkpoint.absorb(state, "b", tmp_path / "a.safetensors", base=where)
    with pytest.raises(ValueError, match=match):
        checkpoint.extract(state, "a", tmp_path / "out", base=where)
    assert contents(state) == before
    assert not (tmp_path / "out").exists()
    assert not list(tmp_path.glob(".*"))


def test_a_task_of_the_state_is_refused(tmp_path: Path, state: Path) -> None:
    with pytest.raises(ValueError, match="task 'a' is already in the state"):
        checkpoint.absorb(
            state, "a", tmp_path / "a.safetensors", base=tmp_path / "base.safetensors"
        )


def test_a_state_is_not_replaced_by_another(tmp_path: Path, state: Path) -> None:
    before = contents(state)
    with pytest.raises(ValueError, match="already holds a state, of the tasks a"):
        checkpoint.unify(tmp_path / "base.safetensors", {"b": tmp_path / "a.safetensors"}, state)
    assert contents(state) == before


def test_a_damaged_state_is_not_absorbed_into(tmp_path: Path, state: Path) -> None:
    (file,) = state.glob("unified-*")
    data = bytearray(file.read_bytes())
    data[-100] ^= 1
    file.write_bytes(data)
    before = contents(state)
    base, tuned, other = tmp_path / "base.safetensors", tmp_path / "a.safetensors", tmp_path / "z"
    checkpoint.unify(base, {"z": tuned}, other)
    damaged = f"{file.name}: checksum"
    with pytest.raises(ValueError, match=damaged):
        checkpoint.absorb(state, "b", tuned, base=base)
    with pytest.raises(ValueError, match=damaged):
        checkpoint.extract(state, "a", tmp_path / "out", base=base)
    with pytest.raises(ValueError, match=damaged):
        checkpoint.merge(state, other, tmp_path / "both")
    assert contents(state) == before


def test_states_that_do_not_merge(tmp_path: Path, state: Path) -> None:
    base, tuned = tmp_path / "base.safetensors", tmp_path / "a.safetensors"
    checkpoint.unify(base, {"a": tuned}, tmp_path / "same")
    with pytest.raises(ValueError, match="both states hold task 'a'"):
        checkpoint.merge(state, tmp_path / "same", tmp_path / "both")
    rule = cx.FusionRule(zero_sum="zero")
    checkpoint.unify(base, {"b": tuned}, tmp_path / "rule", rule=rule)
    with pytest.raises(ValueError, match="differ in rule"):
        checkpoint.merge(state, tmp_path / "rule", tmp_path / "both")
    tensors = load(base)
    tensors["bias"][0] += 1
    moved_base = save(tensors, tmp_path / "moved.safetensors")
    checkpoint.unify(moved_base, {"b": tuned}, tmp_path / "other")
    with pytest.raises(ValueError, match="over different base models: 'bias' differs"):
        checkpoint.merge(state, tmp_path / "other", tmp_path / "both")
    assert not (tmp_path / "both").exists()


@pytest.mark.parametrize("unknown", [0, 1])
def test_a_base_model_that_only_one_state_knows(tmp_path: Path, state: Path, unknown: int) -> None:
    checkpoint.unify(
        tmp_path / "base.safetensors", {"b": tmp_path / "a.safetensors"}, tmp_path / "other"
    )
    states = [state, tmp_path / "other"]
    prints = read_manifest(state).base_fingerprints
    loaded = cx.UnifiedDelta.load(states[unknown])
    loaded.base_fingerprints = {}
    loaded.save(states[unknown])
    checkpoint.merge(*states, tmp_path / "both")
    assert prints
    assert read_manifest(tmp_path / "both").base_fingerprints == prints


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"on_mismatch": "ignore"}, "on_mismatch must be 'error' or 'skip', not 'ignore'"),
        ({"device": "meta"}, "device must be 'cpu' or 'cuda'"),
        ({"max_memory": 0}, "max_memory must be a positive whole number, not 0"),
        ({"max_memory": 1.5}, "max_memory must be a positive whole number, not 1.5"),
    ],
)
def test_options_are_checked(options: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Options(**options)  # type: ignore[arg-type]


def test_no_tasks_and_bad_names(tmp_path: Path, state: Path) -> None:
    base, tuned = tmp_path / "base.safetensors", tmp_path / "a.safetensors"
    with pytest.raises(ValueError, match="tasks: there is no fine-tuned model"):
        checkpoint.unify(base, {}, tmp_path / "new")
    with pytest.raises(ValueError, match="non-empty string"):
        checkpoint.unify(base, {"": tuned}, tmp_path / "new")
    with pytest.raises(TypeError, match="expected a tuple of patterns"):
        checkpoint.unify(base, {"b": tuned}, tmp_path / "new", private="head.*")
    with pytest.raises(KeyError, match="unknown task 'x'; the state holds a"):
        checkpoint.extract(state, "x", tmp_path / "new", base=base)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "notes.txt").touch()
    with pytest.raises(ValueError, match="is not empty"):
        checkpoint.extract(state, "a", tmp_path / "full", base=base)
    assert not (tmp_path / "new").exists()
