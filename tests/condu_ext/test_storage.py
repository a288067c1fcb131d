"""The unified checkpoint: what comes back, what a killed writer leaves, what a reader refuses."""

from __future__ import annotations

import contextlib
import copy
import fcntl
import json
import os
import re
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from kernel_cases import same_bytes
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

import condu_ext as cx
from condu_ext import storage
from condu_ext.fingerprint import file_fingerprint

Model = dict[str, Tensor]
SHAPES = {"enc.w": (20, 7), "enc.b": (9,), "scale": (), "none": (3, 0)}
REFUSALS = (ValueError, FileNotFoundError)


def model(seed: int) -> Model:
    generator = torch.Generator().manual_seed(seed)
    made: Model = {n: torch.randn(s, generator=generator) for n, s in SHAPES.items()}
    made["tied"] = made["enc.b"]
    made["head"] = torch.randn(2 + seed, 3, generator=generator, dtype=torch.float64)
    made["steps"] = torch.tensor([4, 5])
    return made


def make_state(tasks: int = 3, **options: Any) -> cx.UnifiedDelta:
    state = cx.UnifiedDelta.empty(model(0), private=("head",), **options)
    for k in range(tasks):
        state = cx.absorb(state, f"task {k}", model(k + 1), model(0))
    return state


def snapshot(state: cx.UnifiedDelta) -> dict[str, Any]:
    """All that a state says and does."""
    seen: dict[str, Any] = {
        "tasks": state.tasks,
        "rule": state.rule,
        "dtype": state.dtype,
        "base": (state.base_name, state.base_fingerprints),
        "rescalers": [state.rescaler(t) for t in state.tasks],
        **{f"u {n}": t.clone() for n, t in state.delta.items()},
    }
    for task in state.tasks:
        kinds = (state.packed_mask(task), state.private(task), cx.decouple(state, task, None))
        for k, tensors in enumerate(kinds):
            seen |= {f"{task} {k} {n}": t for n, t in tensors.items()}
    return seen


def assert_equal(found: dict[str, Any], expected: dict[str, Any]) -> None:
    assert list(found) == list(expected)
    for name, value in expected.items():
        if isinstance(value, Tensor):
            assert same_bytes(found[name], value), name
        else:
            assert found[name] == value, name


@pytest.fixture
def small_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(storage, "SHARD_BYTES", 100)


# ---- there and back ------------------------------------------------------------------------------


@pytest.mark.parametrize("tasks", [0, 1, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rescale", ["global", "per_tensor"])
def test_round_trip(tmp_path: Path, tasks: int, dtype: torch.dtype, rescale: str) -> None:
    state = make_state(tasks, dtype=dtype, rule=cx.FusionRule("zero", rescale))
    state.record_base(model(0), "tiny")
    state.save(tmp_path / "state")
    loaded = cx.UnifiedDelta.load(tmp_path / "state")
    assert_equal(snapshot(loaded), snapshot(state))
    loaded.verify_base(model(0))
    # It goes on as the saved one would have: ties, private patterns and sums are all there.
    for s in (state, loaded):
        cx.absorb_(s, "more", model(8), model(0))
        if tasks:
            s.drop("task 0")
    assert_equal(snapshot(loaded), snapshot(state))


def test_paths_may_be_strings(tmp_path: Path) -> None:
    make_state(1).save(f"{tmp_path}/a/b")
    assert cx.UnifiedDelta.load(f"{tmp_path}/a/b").tasks == ("task 0",)


@pytest.mark.usefixtures("small_shards")
def test_shards(tmp_path: Path) -> None:
    state = make_state()
    state.save(tmp_path)
    names = sorted(os.listdir(tmp_path))
    assert "unified-1-00001-of-00002.safetensors" in names
    assert "triggers-1-2-00002-of-00002.safetensors" in names
    assert_equal(snapshot(cx.UnifiedDelta.load(tmp_path)), snapshot(state))
    # Masks are cut at the same borders as the unified delta.
    for part in ("00001", "00002"):
        unified = load_file(tmp_path / f"unified-1-{part}-of-00002.safetensors")
        masks = load_file(tmp_path / f"triggers-1-0-{part}-of-00002.safetensors")
        assert set(unified) == set(masks)


def test_files_are_what_the_format_says(tmp_path: Path) -> None:
    """Readable with json, safetensors and NumPy alone; tied tensors once; nothing pickled."""
    state = make_state(2)
    state.record_base(model(0), "tiny")
    state.save(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text(encoding="utf-8"))
    assert config["format_version"] == 1
    assert [t["name"] for t in config["tasks"]] == ["task 0", "task 1"]
    assert config["rule"] == {"zero_sum": "negative", "rescale": "global"}
    assert config["aliases"] == {"tied": "enc.b"}
    assert config["base"]["name"] == "tiny"
    assert set(config["base"]["xxh3"]) == set(SHAPES)
    unified = load_file(tmp_path / "unified-1-00001-of-00001.safetensors")
    assert set(unified) == set(SHAPES)
    for name, tensor in unified.items():
        assert same_bytes(tensor, state.delta[name])
    for number, task in enumerate(state.tasks):
        stored = load_file(tmp_path / f"triggers-1-{number}-00001-of-00001.safetensors")
        for name, packed in stored.items():
            mask = state.mask(task)[name].numpy().reshape(-1)
            np.testing.assert_array_equal(packed.numpy(), np.packbits(mask, bitorder="little"))
        private = load_file(tmp_path / f"private-1-{number}-00001-of-00001.safetensors")
        assert same_bytes(private["head"], model(number + 1)["head"])
    found = {f for f in os.listdir(tmp_path) if not f.startswith(".")}
    assert found == {"config.json", *config["files"]}
    for name, entry in config["files"].items():
        assert entry["size"] == (tmp_path / name).stat().st_size
        assert entry["xxh3"] == file_fingerprint(tmp_path / name)


@pytest.mark.parametrize(
    "name", ["../../evil", "a/b", "C:\\x", "Größe 日本 🙂", "\ud800", "nul\0byte", ".", "x" * 5000]
)
def test_task_names_never_reach_the_file_system(tmp_path: Path, name: str) -> None:
    state = make_state(1)
    state.rename("task 0", name)
    state.save(tmp_path / "s")
    assert cx.UnifiedDelta.load(tmp_path / "s").tasks == (name,)
    assert os.listdir(tmp_path) == ["s"]
    for file in os.listdir(tmp_path / "s"):
        assert re.fullmatch(r"[a-z0-9.-]+", file)


def test_tensor_names_of_any_kind(tmp_path: Path) -> None:
    names = ["", "a/../b", "ünï.weight", "with space", "x" * 300]
    state = cx.unify({"a": {n: torch.ones(2) * k for k, n in enumerate(names)}}, None)
    state.save(tmp_path)
    assert_equal(snapshot(cx.UnifiedDelta.load(tmp_path)), snapshot(state))


@pytest.mark.parametrize("dtype", [torch.bool, torch.int64, torch.float16, torch.float64])
def test_private_tensors_of_any_dtype(tmp_path: Path, dtype: torch.dtype) -> None:
    head = torch.tensor([[0, 1, 1], [1, 0, 0]]).to(dtype).t()
    given = {"w": torch.ones(2), "head": head, "head.view": head[1:], "head.none": head[:0]}
    state = cx.unify({"a": given}, None, private=("head*",))
    state.save(tmp_path)
    loaded = cx.UnifiedDelta.load(tmp_path)
    for name, tensor in state.private("a").items():
        assert same_bytes(loaded.private("a")[name], tensor)


def test_memory_orders(tmp_path: Path) -> None:
    """Logical order on disk: a channels_last state comes back equal by index, and still works."""
    base = {"w": torch.randn(3, 4, 2, 5).to(memory_format=torch.channels_last)}
    models = [{"w": base["w"] + 0.1 * torch.randn(3, 4, 2, 5)} for _ in range(3)]
    state = cx.unify({"a": models[0], "b": models[1]}, base)
    state.save(tmp_path)
    loaded = cx.UnifiedDelta.load(tmp_path)
    assert torch.equal(loaded.delta["w"], state.delta["w"])
    for task in state.tasks:
        assert torch.equal(loaded.mask(task)["w"], state.mask(task)["w"])
        theta = cx.decouple(loaded, task, base)["w"]
        assert torch.equal(theta, cx.decouple(state, task, base)["w"])
    for s in (state, loaded):
        cx.absorb_(s, "c", models[2], base)
    assert torch.equal(loaded.delta["w"], state.delta["w"])
    other = cx.unify({"d": models[2]}, base)
    merged = cx.merge(loaded, other)
    assert torch.equal(merged.delta["w"], cx.merge(state, other).delta["w"])


def test_a_rounded_base_is_remembered(tmp_path: Path) -> None:
    base = {"w": torch.randn(50)}
    tuned = {"w": (base["w"] + 0.5).to(torch.bfloat16)}
    state = cx.unify({"a": tuned}, base, match_dtype=True)
    state.save(tmp_path)
    loaded = cx.UnifiedDelta.load(tmp_path)
    assert same_bytes(cx.decouple(loaded, "a", base)["w"], cx.decouple(state, "a", base)["w"])
    with pytest.raises(ValueError, match="earlier tasks"):
        cx.absorb(loaded, "b", {"w": base["w"] + 1}, base)


def test_dead_tasks_stay_dead(tmp_path: Path, recwarn: pytest.WarningsRecorder) -> None:
    deltas = {"weak": {"w": torch.ones(9)}, "strong": {"w": torch.full((9,), -3.0)}}
    cx.unify(deltas, None).save(tmp_path)
    assert len(recwarn) == 1
    loaded = cx.UnifiedDelta.load(tmp_path)
    loaded = cx.absorb(loaded, "third", {"w": torch.full((9,), 1.0)}, None)
    assert "'weak'" not in str([w.message for w in recwarn.list[1:]])
    assert loaded.rescaler("weak") == 0.0


def test_loaded_states_are_ordinary_under_inference_mode(tmp_path: Path) -> None:
    cx.unify({"a": {"w": torch.ones(9)}}, None).save(tmp_path)
    with torch.inference_mode():
        loaded = cx.UnifiedDelta.load(tmp_path)
    with pytest.warns(UserWarning, match="'a'"):
        cx.absorb_(loaded, "b", {"w": torch.full((9,), -3.0)}, None)
    assert loaded.rescaler("a") == 0.0


def test_defaults_of_torch_do_not_matter(tmp_path: Path) -> None:
    state = make_state(2)
    expected = snapshot(state)
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        with torch.device("meta"):
            state.save(tmp_path)
            loaded = cx.UnifiedDelta.load(tmp_path)
    finally:
        torch.set_default_dtype(before)
    assert_equal(snapshot(loaded), expected)


def test_a_damaged_state_is_not_saved(tmp_path: Path) -> None:
    state = make_state(1)
    state.save(tmp_path)
    before = snapshot(state)
    broken = model(2) | {"enc.w": torch.full((20, 7), torch.nan)}
    with pytest.raises(ValueError, match=r"enc\.w"):
        cx.absorb_(state, "bad", broken, model(0), check=False)
    with pytest.raises(RuntimeError, match="lost"):
        state.save(tmp_path)
    assert_equal(snapshot(cx.UnifiedDelta.load(tmp_path)), before)


# ---- replacing a state ---------------------------------------------------------------------------


@pytest.mark.usefixtures("small_shards")
def test_saving_again_replaces_and_cleans_up(tmp_path: Path) -> None:
    make_state(3).save(tmp_path)
    (tmp_path / "notes.txt").write_text("mine")
    (tmp_path / "unified-99-00001-of-00001.safetensors").write_bytes(b"left by a killed writer")
    state = make_state(1)
    state.save(tmp_path)
    assert_equal(snapshot(cx.UnifiedDelta.load(tmp_path)), snapshot(state))
    listed = json.loads((tmp_path / "config.json").read_text())["files"]
    found = {f for f in os.listdir(tmp_path) if not f.startswith(".")}
    assert found == {"config.json", "notes.txt", *listed}
    assert not any("-99-" in f for f in found)


def test_a_foreign_config_is_not_overwritten(tmp_path: Path) -> None:
    text = '{"model_type": "clip"}'
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(ValueError, match=r"config\.json"):
        make_state(1).save(tmp_path)
    assert (tmp_path / "config.json").read_text() == text
    assert not list(tmp_path.glob("*.safetensors"))


class Killed(BaseException):
    """Stands for anything that ends a save: a full disk, Ctrl-C."""


REMOVALS = 5  # files of a small state of one task, which a successful save removes


def watched(patch: pytest.MonkeyPatch, before: Callable[[str, str], None]) -> list[tuple[str, str]]:
    """Calls ``before(step, file name)`` ahead of every step of a save; the list of all steps."""
    seen: list[tuple[str, str]] = []
    real = (storage.save_file, os.fsync, os.replace, Path.unlink)

    def step(name: str, file: Any) -> None:
        seen.append((name, Path(file).name))
        before(*seen[-1])

    def fsync(descriptor: int) -> None:
        step("fsync", os.readlink(f"/proc/self/fd/{descriptor}"))
        real[1](descriptor)

    def save(tensors: Model, file: Any, *rest: Any, **named: Any) -> None:
        step("save_file", file)
        real[0](tensors, file, *rest, **named)

    def replace(source: Any, target: Any, **named: Any) -> None:
        step("replace", target)
        real[2](source, target, **named)

    def unlink(self: Path, missing_ok: bool = False) -> None:
        if self.exists():
            step("unlink", self)
        real[3](self, missing_ok)

    patch.setattr(storage, "save_file", save)
    patch.setattr(os, "fsync", fsync)
    patch.setattr(os, "replace", replace)
    patch.setattr(Path, "unlink", unlink)
    return seen


@pytest.fixture
def needs_proc() -> None:
    if not os.path.isdir("/proc/self/fd"):
        pytest.skip("needs /proc to see which file is synced")


@pytest.mark.usefixtures("small_shards", "needs_proc")
def test_everything_is_synced_before_the_commit(tmp_path: Path) -> None:
    """Data files, then the new config, then the rename, then the folder; removal comes last."""
    make_state(1).save(tmp_path)
    with pytest.MonkeyPatch.context() as patch:
        steps = watched(patch, lambda step, file: None)
        make_state(2).save(tmp_path)
    data = [file for step, file in steps if step == "save_file"]
    assert len(data) == 2 * 3 + 2
    commit = steps.index(("replace", "config.json"))
    *synced, config = [file for step, file in steps[:commit] if step == "fsync"]
    assert sorted(synced) == sorted(data)
    assert "config.json" in config
    assert steps[commit + 1] == ("fsync", tmp_path.name)
    assert {step for step, _ in steps[commit + 2 :]} == {"unlink"}
    for file in data:
        assert steps.index(("save_file", file)) < steps.index(("fsync", file))


def count_steps(state: cx.UnifiedDelta, path: Path) -> int:
    with pytest.MonkeyPatch.context() as patch:
        steps = watched(patch, lambda step, file: None)
        state.save(path)
    return len(steps)


def assert_only_listed_files(path: Path) -> None:
    listed = json.loads((path / "config.json").read_text())["files"]
    found = {f for f in os.listdir(path) if not f.startswith(".lock")}
    assert found == {"config.json", *listed}


@pytest.mark.usefixtures("small_shards", "needs_proc")
@pytest.mark.parametrize("error", [Killed, OSError(28, "No space left on device"), SafetensorError])
def test_a_save_that_fails_at_any_step(tmp_path: Path, error: Any) -> None:
    """The error comes out, but not an OSError where old files are removed after the commit; a load
    gives the whole old state or the whole new one."""
    old, new = make_state(1), make_state(2)
    states = {s.tasks: snapshot(s) for s in (old, new)}
    outcomes = set()
    for number in range(count_steps(new, tmp_path / "count") + REMOVALS):
        path = tmp_path / str(number)
        old.save(path)
        steps: list[str] = []

        def fail(step: str, file: str) -> None:
            steps.append(step)  # noqa: B023
            if len(steps) == number + 1:  # noqa: B023
                raise error

        raised = False
        with pytest.MonkeyPatch.context() as patch:
            watched(patch, fail)
            try:
                new.save(path)
            except (Killed, OSError, SafetensorError):
                raised = True
        assert raised != (isinstance(error, OSError) and steps[number] == "unlink")
        found = cx.UnifiedDelta.load(path)
        assert_equal(snapshot(found), states[found.tasks])
        outcomes.add(found.tasks)
        new.save(path)  # and the next save works, and cleans up
        assert_only_listed_files(path)
    assert outcomes == {old.tasks, new.tasks}


def test_an_interrupt_right_after_the_commit(tmp_path: Path) -> None:
    """Ctrl-C when the new config is in place: its files must not be taken for leftovers."""
    old, new = make_state(1), make_state(2)
    old.save(tmp_path)
    real = os.replace

    def replace(source: Any, target: Any) -> None:
        real(source, target)
        raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "replace", replace)
        with pytest.raises(KeyboardInterrupt):
            new.save(tmp_path)
    assert_equal(snapshot(cx.UnifiedDelta.load(tmp_path)), snapshot(new))
    old.save(tmp_path)
    assert_only_listed_files(tmp_path)


@pytest.mark.usefixtures("small_shards", "needs_proc")
@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_writer_that_is_killed_at_any_step(tmp_path: Path) -> None:
    """No handler runs: the process is gone between two steps."""
    old, new = make_state(1), make_state(2)
    states = {s.tasks: snapshot(s) for s in (old, new)}
    outcomes = set()
    for number in range(count_steps(new, tmp_path / "count") + REMOVALS):
        path = tmp_path / str(number)
        old.save(path)
        child = os.fork()
        if not child:
            with contextlib.suppress(BaseException):
                calls = 0

                def die(step: str, file: str) -> None:
                    nonlocal calls
                    calls += 1
                    if calls == number + 1:  # noqa: B023
                        os._exit(9)

                watched(pytest.MonkeyPatch(), die)
                new.save(path)
            os._exit(0)
        os.waitpid(child, 0)
        found = cx.UnifiedDelta.load(path)
        assert_equal(snapshot(found), states[found.tasks])
        outcomes.add(found.tasks)
        new.save(path)
        assert_only_listed_files(path)
    assert outcomes == {old.tasks, new.tasks}


def test_a_second_writer_is_kept_out(tmp_path: Path) -> None:
    first, second = make_state(1), make_state(2)
    reached, go_on = threading.Event(), threading.Event()
    real = storage.save_file

    def slow(*args: Any, **named: Any) -> None:
        reached.set()
        go_on.wait(60)
        real(*args, **named)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(storage, "save_file", slow)
        writer = threading.Thread(target=first.save, args=(tmp_path,), daemon=True)
        writer.start()
        assert reached.wait(60)
        with pytest.raises(RuntimeError, match="writing"):
            second.save(tmp_path)
        go_on.set()
        writer.join(60)
    assert cx.UnifiedDelta.load(tmp_path).tasks == first.tasks
    second.save(tmp_path)
    assert cx.UnifiedDelta.load(tmp_path).tasks == second.tasks


def test_readers_while_a_writer_replaces(tmp_path: Path) -> None:
    """Every load gives one whole state; none fails because files went away under it."""
    states = {s.tasks: snapshot(s) for s in (make_state(1), make_state(3))}
    writers = [make_state(1), make_state(3)]
    writers[0].save(tmp_path)
    done = threading.Event()
    errors: list[BaseException] = []

    def write() -> None:
        try:
            for k in range(30):
                writers[k % 2].save(tmp_path)
        except BaseException as error:
            errors.append(error)
        finally:
            done.set()

    thread = threading.Thread(target=write, daemon=True)
    thread.start()
    loads = 0
    while not done.is_set() or not loads:
        found = cx.UnifiedDelta.load(tmp_path)
        assert_equal(snapshot(found), states[found.tasks])
        loads += 1
    thread.join(60)
    assert errors == []


# ---- what is refused -----------------------------------------------------------------------------


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    make_state(2).save(tmp_path / "s")
    return tmp_path / "s"


def data_files(path: Path) -> Iterator[Path]:
    return iter(sorted(path.glob("*.safetensors")))


def change_config(path: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    config = json.loads((path / "config.json").read_text())
    change(config)
    (path / "config.json").write_text(json.dumps(config))


def sign(path: Path, file: Path) -> None:
    """Make the config agree with a changed data file."""
    entry = {"size": file.stat().st_size, "xxh3": file_fingerprint(file)}
    change_config(path, lambda config: config["files"].update({file.name: entry}))


def test_nothing_there(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "none"):
        with pytest.raises(FileNotFoundError, match=re.escape(str(path))):
            cx.UnifiedDelta.load(path)


def test_files_that_are_damaged(saved: Path) -> None:
    """Truncated, longer, one bit flipped, gone, or empty: named, each of them."""
    for file in data_files(saved):
        good = file.read_bytes()
        flipped = bytearray(good)
        flipped[-1] ^= 1
        for bad in (good[:-1], good + b"\0", bytes(flipped), b""):
            file.write_bytes(bad)
            with pytest.raises(ValueError, match=re.escape(file.name)):
                cx.UnifiedDelta.load(saved)
        file.unlink()
        with pytest.raises(FileNotFoundError, match=re.escape(file.name)):
            cx.UnifiedDelta.load(saved)
        file.write_bytes(good)
    cx.UnifiedDelta.load(saved)


def test_damaged_files_with_a_matching_checksum(saved: Path) -> None:
    """Whoever forges the checksum too still gets an error, not a crash."""
    for file in data_files(saved):
        good, config = file.read_bytes(), (saved / "config.json").read_text()
        for bad in (
            b"",
            good[:7],
            good[:-1],
            b"\xff" * 100,
            b"\x80" + b"\x04" * 200,
            good[:8] + b"{" * 200,
        ):
            file.write_bytes(bad)
            sign(saved, file)
            with pytest.raises(ValueError, match=re.escape(file.name)):
                cx.UnifiedDelta.load(saved)
        file.write_bytes(good)
        (saved / "config.json").write_text(config)


@pytest.mark.parametrize("kind", ["unified", "triggers"])
@pytest.mark.parametrize("change", ["shape", "dtype", "missing", "extra"])
def test_data_files_that_do_not_fit(saved: Path, kind: str, change: str) -> None:
    file = next(f for f in data_files(saved) if f.name.startswith(kind))
    tensors = load_file(file)
    name = "enc.w"
    if change == "shape":
        tensors[name] = tensors[name].reshape(-1)[:-1].clone()
    elif change == "dtype":
        tensors[name] = tensors[name].to(torch.float16)
    elif change == "missing":
        del tensors[name]
    else:
        tensors[name := "more"] = torch.ones(1)
    save_file(tensors, file)
    sign(saved, file)
    with pytest.raises(ValueError, match=f"{re.escape(file.name)}.*{re.escape(name)}"):
        cx.UnifiedDelta.load(saved)


@pytest.mark.parametrize(
    "name",
    [
        "../x.safetensors",
        "/etc/passwd",
        "a/unified-1-00001-of-00001.safetensors",
        "config.json",
        "",
    ],
)
def test_file_names_that_leave_the_folder(saved: Path, name: str) -> None:
    change_config(saved, lambda c: c["files"].update({name: {"size": 1, "xxh3": "0"}}))
    with pytest.raises(ValueError, match=r"config\.json"):
        cx.UnifiedDelta.load(saved)


@pytest.mark.parametrize("version", [0, 2, "1", None, 1.5])
def test_unknown_versions(saved: Path, version: Any) -> None:
    change_config(saved, lambda c: c.update(format_version=version))
    with pytest.raises(ValueError, match=rf"config\.json.*version {version!r}"):
        cx.UnifiedDelta.load(saved)
    with pytest.raises(ValueError, match="version"):
        make_state(1).save(saved)


def test_a_file_that_is_not_listed(saved: Path) -> None:
    name = "unified-1-00001-of-00001.safetensors"
    change_config(saved, lambda c: c["files"].pop(name))
    with pytest.raises(ValueError, match=rf"config\.json.*{name}"):
        cx.UnifiedDelta.load(saved)


def test_garbage_that_is_not_listed_is_not_read(saved: Path) -> None:
    before = snapshot(cx.UnifiedDelta.load(saved))
    (saved / "unified-7-00001-of-00001.safetensors").write_bytes(b"junk")
    (saved / "config.json.tmp").write_bytes(b"junk")
    assert_equal(snapshot(cx.UnifiedDelta.load(saved)), before)


@pytest.mark.parametrize(
    "text",
    ["", "[]", "{", "null", "[" * 100_000, "\xff", "{}", "1", '{"format": ' + "9" * 5000 + "}"],
    ids=range(9),
)
def test_configs_that_are_none(saved: Path, text: str) -> None:
    (saved / "config.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(ValueError, match=r"config\.json"):
        cx.UnifiedDelta.load(saved)


def places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The way to every value inside nested JSON."""
    children = value.items() if isinstance(value, dict) else enumerate(value)
    for key, child in children:
        yield (*path, key)
        if isinstance(child, (dict, list)):
            yield from places(child, (*path, key))


JUNK = [
    None,
    True,
    -1,
    0,
    10**400,
    1e300,
    1.5,
    float("nan"),
    "",
    "enc.w",
    "task 0",
    [],
    [None],
    {},
    {"a": 1},
]


def attempt(path: Path) -> str:
    """ "refused", "harmless", or what went wrong when a state was loaded and read."""
    try:
        state = cx.UnifiedDelta.load(path)
    except REFUSALS as error:
        return "refused" if str(path) in str(error) else f"an error without the file: {error}"
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    for task in state.tasks:
        state.mask(task)
        if not all(t.isfinite().all() for t in cx.decouple(state, task, None).values()):
            return "a value that is not finite"
    return "harmless"


@pytest.fixture
def little_memory() -> Iterator[None]:
    """At most 2 GiB more than now: what asks for more gets a MemoryError instead of swapping."""
    resource = pytest.importorskip("resource")
    before = resource.getrlimit(resource.RLIMIT_AS)
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + (2 << 30), before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_AS, before)


@pytest.mark.usefixtures("needs_proc", "little_memory")
def test_sizes_beyond_memory(saved: Path) -> None:
    """What nothing backs is refused before memory for it is asked for."""
    change_config(saved, lambda c: c["tensors"][0].update(shape=[1 << 50], order=[0]))
    with pytest.raises(ValueError, match=r"enc\.w"):
        cx.UnifiedDelta.load(saved)
    for shards in (0, 1 << 40):
        change_config(saved, lambda c: c.update(shards=shards))  # noqa: B023
        with pytest.raises(ValueError, match=r"config\.json.*shards"):
            cx.UnifiedDelta.load(saved)


@pytest.mark.usefixtures("needs_proc", "little_memory")
def test_any_value_of_the_config_may_be_wrong(saved: Path) -> None:
    """Every value replaced by junk, or removed: refused by a clear error, or harmless."""
    config = json.loads((saved / "config.json").read_text())
    outcomes = {"refused": 0, "harmless": 0}
    wrong = []
    for place in places(config):
        for junk in [*JUNK, "remove"]:
            broken = copy.deepcopy(config)
            parent = broken
            for key in place[:-1]:
                parent = parent[key]
            if junk == "remove":
                del parent[place[-1]]
            else:
                parent[place[-1]] = junk
            (saved / "config.json").write_text(json.dumps(broken))
            outcome = attempt(saved)
            if outcome in outcomes:
                outcomes[outcome] += 1
            else:
                wrong.append(f"{place} = {str(junk)[:20]}: {outcome}")
    assert not wrong, "\n".join(wrong)
    assert outcomes["refused"] > 500
    assert outcomes["harmless"] > 50


def test_objects_in_place_of_a_state(tmp_path: Path) -> None:
    """A path that is a file."""
    (tmp_path / "file").write_text("x")
    with pytest.raises(OSError, match="file"):
        make_state(1).save(tmp_path / "file")
    with pytest.raises(OSError, match="file"):
        cx.UnifiedDelta.load(tmp_path / "file")


def test_lock_that_was_removed_while_it_was_taken(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It keeps nobody out, so it does not count."""
    lock = fcntl.flock
    calls = 0

    def removed_before(*arguments: Any) -> None:
        nonlocal calls
        calls += 1
        if calls == 1:
            (tmp_path / ".lock").unlink()
        lock(*arguments)

    monkeypatch.setattr(fcntl, "flock", removed_before)
    with (
        storage.writer_lock(tmp_path),
        pytest.raises(RuntimeError, match="another process is writing"),
        storage.writer_lock(tmp_path),
    ):
        pass
    assert calls == 3
