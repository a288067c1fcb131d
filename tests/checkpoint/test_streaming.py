"""Fusing checkpoints by ranges gives what fusing whole models in memory gives, bit for bit."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from range_models import assert_same, data_bytes, load, model, moved, save
from torch import Tensor

import condu_ext as cx
from condu import checkpoint
from condu.checkpoint import Options, memory
from condu_ext import FusionRule, storage
from condu_ext.layout import CHUNK
from condu_ext.manifest import read_manifest

TASKS = ("a", "b", "c")


@pytest.fixture
def pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """Small files and units, so that small models are cut everywhere."""
    monkeypatch.setattr(storage, "SHARD_BYTES", 700_000)
    monkeypatch.setattr(memory, "_BEST", CHUNK)


class Models:
    """A base and three fine-tuned models, in memory and in files."""

    def __init__(self, folder: Path, dtype: torch.dtype = torch.float32) -> None:
        self.base = model(0, dtype=dtype)
        self.tasks = {task: moved(self.base, k) for k, task in enumerate(TASKS)}
        self.base_file = save(self.base, folder / "base.safetensors")
        self.files = {
            task: save(m, folder / f"{task}.safetensors") for task, m in self.tasks.items()
        }

    def state(self, *names: str, **options: object) -> cx.UnifiedDelta:
        chosen = {name: self.tasks[name] for name in names or TASKS}
        state = cx.unify(chosen, self.base, **options)  # type: ignore[arg-type]
        state.record_base(self.base)
        return state

    def unify(self, out: Path, *names: str, **options: object) -> Path:
        chosen = {name: self.files[name] for name in names or TASKS}
        checkpoint.unify(self.base_file, chosen, out, **options)  # type: ignore[arg-type]
        return out


@pytest.fixture
def models(tmp_path: Path, pieces: None) -> Models:
    return Models(tmp_path / "models")


RULES = [
    FusionRule(zero_sum=zero_sum, rescale=rescale)
    for zero_sum, rescale in itertools.product(
        ("negative", "positive", "zero"), ("global", "tensor_mean", "per_tensor")
    )
]


@pytest.mark.parametrize("rule", RULES, ids=str)
def test_unify(models: Models, tmp_path: Path, rule: FusionRule) -> None:
    assert_same(models.unify(tmp_path / "state", rule=rule), models.state(rule=rule))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("state", [torch.float32, torch.bfloat16], ids=str)
def test_dtypes(tmp_path: Path, pieces: None, dtype: torch.dtype, state: torch.dtype) -> None:
    models = Models(tmp_path / "models", dtype)
    out = models.unify(tmp_path / "state", "a", "b", dtype=state)
    expected = models.state("a", "b", dtype=state)
    assert_same(out, expected)
    checkpoint.absorb(out, "c", models.files["c"], base=models.base_file)
    assert_same(out, cx.absorb(expected, "c", models.tasks["c"], models.base))
    checkpoint.extract(out, "b", tmp_path / "expert", base=models.base_file)
    assert_equal_models(
        load(tmp_path / "expert"), cx.decouple(cx.UnifiedDelta.load(out), "b", models.base)
    )


@pytest.mark.parametrize("in_place", [True, False])
def test_absorb(models: Models, tmp_path: Path, in_place: bool) -> None:
    old = models.unify(tmp_path / "old", "a", "b")
    before = data_bytes(old)
    out = None if in_place else tmp_path / "new"
    checkpoint.absorb(old, "c", models.files["c"], out, base=models.base_file)
    expected = cx.absorb(models.state("a", "b"), "c", models.tasks["c"], models.base)
    assert_same(out or old, expected)
    if out:
        assert data_bytes(old) == before
    else:
        listed = read_manifest(old).files
        assert data_bytes(old).keys() == {*listed, "config.json"}


def test_merge_and_extract(models: Models, tmp_path: Path) -> None:
    a, b = models.unify(tmp_path / "a", "a"), models.unify(tmp_path / "b", "b", "c")
    checkpoint.merge(a, b, tmp_path / "both")
    expected = cx.merge(models.state("a"), models.state("b", "c"))
    assert_same(tmp_path / "both", expected)
    for task in TASKS:
        out = tmp_path / f"{task}.safetensors"
        checkpoint.extract(tmp_path / "both", task, out, base=models.base_file)
        assert_equal_models(load(out), cx.decouple(expected, task, models.base))


def test_absorbing_into_a_state_made_in_memory(tmp_path: Path, pieces: None) -> None:
    """Tied names and memory orders come from memory; files have neither."""
    base = model(0)
    base["image"] = torch.randn(8, 3, 5, 5).to(memory_format=torch.channels_last)
    base["tied"] = base["matrix"]
    tuned = moved(base, 1) | {"image": base["image"] + 0.25}
    tuned["tied"] = tuned["matrix"]
    state = cx.unify({"a": tuned}, base)
    state.save(tmp_path / "state")
    contiguous = {name: t.contiguous() for name, t in base.items() if name != "tied"}
    more = moved(contiguous, 2)
    checkpoint.absorb(
        tmp_path / "state",
        "b",
        save(more, tmp_path / "b.safetensors"),
        base=save(contiguous, tmp_path / "base.safetensors"),
    )
    found, expected = cx.UnifiedDelta.load(tmp_path / "state"), cx.absorb(state, "b", more, base)
    for name, delta in expected.delta.items():
        assert torch.equal(found.delta[name], delta), name
    assert found.rescaler("a") == pytest.approx(expected.rescaler("a"), rel=5e-7)  # 4 ulp
    both = contiguous | {"tied": contiguous["matrix"].clone()}
    checkpoint.extract(
        tmp_path / "state",
        "b",
        tmp_path / "expert",
        base=save(both, tmp_path / "both.safetensors"),
    )
    expert = load(tmp_path / "expert")
    assert torch.equal(expert["tied"], expert["matrix"])
    assert not torch.equal(expert["tied"], both["tied"])


@pytest.mark.parametrize("workers", [1, 5])
@pytest.mark.parametrize("units", [CHUNK, 3 * CHUNK, 64 * CHUNK])
def test_how_it_is_cut_changes_no_byte(
    models: Models, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, workers: int, units: int
) -> None:
    expected = data_bytes(models.unify(tmp_path / "expected"))
    monkeypatch.setattr(memory, "_BEST", units)
    out = models.unify(tmp_path / "state", options=Options(workers=workers))
    assert data_bytes(out) == expected


def test_zero_sums_are_counted(models: Models, tmp_path: Path) -> None:
    counted = read_manifest(models.unify(tmp_path / "state")).zero_sums
    expected = []
    for name in (n for n, t in models.base.items() if t.is_floating_point()):
        deltas = [models.tasks[task][name] - models.base[name] for task in TASKS]
        total = (deltas[0] + deltas[1]) + deltas[2]
        expected.append(int(((total == 0) & (torch.stack(deltas) != 0).any(0)).sum()))
    names = [entry.name for entry in read_manifest(tmp_path / "state").spec.tensors]
    by_name = dict(zip(names, counted or [], strict=True))
    assert [by_name[n] for n, t in models.base.items() if t.is_floating_point()] == expected
    assert sum(expected) > 1000


def test_private_tensors_of_each_task(models: Models, tmp_path: Path) -> None:
    for number, (task, tuned) in enumerate(models.tasks.items()):
        tuned["head.weight"] = torch.randn(number + 2, 9).double()
        save(tuned, models.files[task])
    models.base["head.weight"] = torch.zeros(2, 9, dtype=torch.float64)
    save(models.base, models.base_file)
    private = ("head.*", "bias")
    state = models.unify(tmp_path / "state", "a", "b", private=private)
    assert_same(state, models.state("a", "b", private=private))
    checkpoint.absorb(state, "c", models.files["c"], base=models.base_file)
    expected = cx.absorb(
        models.state("a", "b", private=private), "c", models.tasks["c"], models.base
    )
    assert_same(state, expected)
    for task in TASKS:
        checkpoint.extract(state, task, tmp_path / task, base=models.base_file)
        assert_equal_models(load(tmp_path / task), cx.decouple(expected, task, models.base))
    other = models.unify(tmp_path / "other", "c", private=private)
    ab = models.unify(tmp_path / "ab", "a", "b", private=private)
    checkpoint.merge(ab, other, tmp_path / "merged")
    assert_same(
        tmp_path / "merged",
        cx.merge(models.state("a", "b", private=private), models.state("c", private=private)),
    )


def test_a_narrower_fine_tune(tmp_path: Path, pieces: None) -> None:
    models = Models(tmp_path / "models")
    for task, tuned in models.tasks.items():
        for name, tensor in tuned.items():
            if tensor.is_floating_point() and name != "bias":
                tuned[name] = tensor.bfloat16()
        save(tuned, models.files[task])
    with pytest.raises(
        ValueError, match=r"task 'a', tensor 'matrix': is torch\.bfloat16, narrower"
    ):
        models.unify(tmp_path / "state")
    assert not (tmp_path / "state").exists()
    options = Options(match_dtype=True)
    state = models.unify(tmp_path / "state", "a", "b", options=options)
    expected = models.state("a", "b", match_dtype=True)
    assert_same(state, expected)
    checkpoint.absorb(state, "c", models.files["c"], base=models.base_file, options=options)
    expected = cx.absorb(expected, "c", models.tasks["c"], models.base, match_dtype=True)
    assert_same(state, expected)
    checkpoint.extract(state, "c", tmp_path / "expert", base=models.base_file)
    assert_equal_models(load(tmp_path / "expert"), cx.decouple(expected, "c", models.base))


def test_a_task_outvoted_everywhere(tmp_path: Path, pieces: None) -> None:
    base = {"w": torch.zeros(2 * CHUNK + 8)}
    quiet = {"w": torch.full_like(base["w"], 0.5)}
    loud = {"w": torch.full_like(base["w"], -1.0)}
    where = save(base, tmp_path / "base.safetensors")
    files = {
        "quiet": save(quiet, tmp_path / "quiet.safetensors"),
        "loud": save(loud, tmp_path / "loud.safetensors"),
    }
    with pytest.warns(UserWarning, match="'quiet' was outvoted on every parameter"):
        checkpoint.unify(where, files, tmp_path / "state")
    state = cx.UnifiedDelta.load(tmp_path / "state")
    assert state.rescaler("quiet") == 0
    assert not state.mask("quiet")["w"].any()
    # dead stays dead, without another warning
    still = save({"w": torch.full_like(base["w"], 2.0)}, tmp_path / "still.safetensors")
    with pytest.warns(UserWarning, match="outvoted on every parameter") as caught:
        checkpoint.absorb(tmp_path / "state", "third", still, base=where)
    assert [str(w.message)[:12] for w in caught] == ["task 'loud' "]


def assert_equal_models(found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype, name
        assert torch.equal(found[name], tensor), name
