"""Cases of sharded states on disk: the files of one process, read back in parts."""

from __future__ import annotations

import errno
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from shard_fusing import unified
from shard_group import Case, Group
from shard_models import PRIVATE, Spread, adopt_sums, assert_same_state, local
from torch import Tensor
from torch.distributed.tensor import DTensor, Partial, Shard

import condu_ext as cx
from condu_ext import fingerprint, storage


def config(folder: Path) -> dict[str, Any]:
    values: dict[str, Any] = json.loads((folder / "config.json").read_text())
    return values


def cut_small(patch: pytest.MonkeyPatch) -> None:
    """Many files, so that they are cut between tensors."""
    patch.setattr(storage, "SHARD_BYTES", 1000)


def files_of_one_process(group: Group) -> None:
    """Data files byte for byte, and the config but for versions of files that were there."""
    spread = group.small
    base = spread.base()
    sharded, whole = unified(spread, 3)
    sharded.record_base(spread.shard(base), "tiny")
    whole.record_base(base, "tiny")
    assert sharded.base_fingerprints == whole.base_fingerprints
    own, one = group.shared("files"), group.folder / f"files-{group.rank}"
    with pytest.MonkeyPatch.context() as patch:
        cut_small(patch)
        sharded.save(own)
        whole.save(one)
    assert config(own) == config(one)
    names = sorted(file.name for file in own.iterdir())
    assert names == sorted(file.name for file in one.iterdir())
    assert len(names) > 10
    for name in names:
        if name != "config.json":
            assert (own / name).read_bytes() == (one / name).read_bytes(), name
    loaded = cx.UnifiedDelta.load(own)
    assert_same_state_whole(loaded, whole)
    loaded.verify_base(base)


def assert_same_state_whole(found: cx.UnifiedDelta, expected: cx.UnifiedDelta) -> None:
    assert found.spec == expected.spec
    for name, tensor in expected.delta.items():
        assert torch.equal(found.delta[name], tensor)


def read_in_parts(group: Group) -> None:
    """Every process reads its own part, and the sequence goes on as if it had not stopped."""
    spreads = [group.small, group.grid] if group.world == 4 else [group.small]
    for number, spread in enumerate(spreads):
        base = spread.base()
        start = spread.shard(base)
        sharded, whole = unified(spread)
        sharded.record_base(start)
        folder = group.shared(f"parts-{number}")
        sharded.save(folder)
        loaded = cx.UnifiedDelta.load(folder, like=start)
        assert_same_state(spread, loaded, whole)
        assert list(loaded.spec.tensors) == list(sharded.spec.tensors)
        loaded.verify_base(start)
        adopt_sums(whole, loaded)
        model = spread.tuned(3)
        loaded = cx.absorb(loaded, "next", spread.shard(model), start)
        assert_same_state(spread, loaded, cx.absorb(whole, "next", model, base))


def read_by_other_processes(group: Group) -> None:
    """From one process to many, and onto other placements than those that were saved."""
    spread = group.small
    _, whole = unified(spread)
    folder = group.shared("other")
    if group.rank == 0:
        whole.save(folder)
    group.shared("other")  # waits for it
    other = Spread(
        group.mesh,
        {n: (shape, (spread_dim(shape),)) for n, (shape, _) in spread.tensors.items() if shape},
    )
    like = other.shard({n: t for n, t in other.base().items() if n != "head.weight"})
    loaded = cx.UnifiedDelta.load(folder, like=like | {"scalar": torch.zeros(())})
    for name, tensor in whole.delta.items():
        expected = tensor if name == "scalar" else other.part(name, tensor)
        assert torch.equal(local(loaded.delta[name]), expected)
        mask = whole.mask("task 1")[name]
        expected = mask if name == "scalar" else other.part(name, mask)
        assert torch.equal(local(loaded.mask("task 1")[name]), expected)
    head = whole.private("task 1")["head.weight"]
    assert torch.equal(loaded.private("task 1")["head.weight"], head)  # not in `like`: whole


def spread_dim(shape: tuple[int, ...]) -> Any:
    return Shard(len(shape) - 1)


def full_disk(group: Group) -> None:
    """Where only the writer meets an error, all raise it, and the old state stays."""
    spread = group.small
    first, _ = unified(spread)
    second = cx.absorb(first, "3", spread.shard(spread.tuned(3)), spread.shard(spread.base()))
    folder = group.shared("full")
    first.save(folder)
    listed = sorted(file.name for file in folder.iterdir())
    real, written = storage.save_file, []

    def no_space(contents: dict[str, Tensor], file: Path) -> None:
        written.append(file)
        if len(written) == 3:
            raise OSError(errno.ENOSPC, "No space left on device", str(file))
        real(contents, file)

    group.shared("full")
    with pytest.MonkeyPatch.context() as patch:
        cut_small(patch)
        patch.setattr(storage, "save_file", no_space)
        with pytest.raises(OSError, match="No space left") as caught:
            second.save(folder)
    assert ("rank 0" in str(caught.value)) == (group.rank != 0)
    assert caught.value.errno == errno.ENOSPC
    assert Path(caught.value.filename).parent == folder
    assert len(written) == (3 if group.rank == 0 else 0)
    group.shared("full")
    assert sorted(file.name for file in folder.iterdir()) == listed
    assert cx.UnifiedDelta.load(folder).tasks == first.tasks
    group.shared("full")
    second.save(folder)
    like = spread.shard(spread.base())
    assert cx.UnifiedDelta.load(folder, like=like).tasks == second.tasks


def failures_between_two_gathers(group: Group) -> None:
    """A process that fails on one tensor takes part in gathering the rest, and all hear of it."""
    spread = group.small
    state, _ = unified(spread)
    base = spread.shard(spread.base())
    folder = group.shared("between")

    def broken(*_: object) -> None:
        raise MemoryError("not enough memory")

    for module, function, call in (
        (storage, "pack_bits", lambda: state.save(folder)),
        (fingerprint, "fingerprint", lambda: state.record_base(base)),
    ):
        with pytest.MonkeyPatch.context() as patch:
            if group.rank == 0:
                patch.setattr(module, function, broken)
            with pytest.raises(MemoryError, match="not enough memory"):
                call()
    assert not state.base_fingerprints
    group.shared("between")
    assert [file.name for file in folder.iterdir()] == [".lock"]
    group.shared("between")
    state.save(folder)
    assert cx.UnifiedDelta.load(folder, like=base).tasks == state.tasks


def clean_up_that_fails(group: Group) -> None:
    """The new state is in force all the same, and the next save removes what was left."""
    state, _ = unified(group.small)
    folder = group.shared("clean")
    state.save(folder)

    def refused(*_: object) -> None:
        raise PermissionError(errno.EACCES, "Permission denied")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(storage, "_remove_others", refused)
        state.save(folder)
    group.shared("clean")
    assert len(list(folder.iterdir())) > len(config(folder)["files"]) + 2
    assert cx.UnifiedDelta.load(folder).tasks == state.tasks
    group.shared("clean")
    state.save(folder)
    group.shared("clean")  # waits for the writer, which removes files when the rest is done
    assert len(list(folder.iterdir())) == len(config(folder)["files"]) + 2


def damaged_file(group: Group) -> None:
    """A file that another process checks is refused by all."""
    spread = group.small
    state, _ = unified(spread)
    folder = group.shared("damaged")
    state.save(folder)
    names = [name for name in config(folder)["files"]]
    for number, name in enumerate(names):
        file = folder / name
        content = file.read_bytes()
        group.shared("damaged")
        if group.rank == 0:
            file.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
        group.shared("damaged")
        with pytest.raises(ValueError, match=rf"{name}: checksum") as caught:
            cx.UnifiedDelta.load(folder, like=spread.shard(spread.base()))
        culprit = number % group.world
        assert (f"rank {culprit}:" in str(caught.value)) == (group.rank != culprit)
        group.shared("damaged")
        if group.rank == 0:
            file.write_bytes(content)


def another_writer(group: Group) -> None:
    state, _ = unified(group.small)
    folder = group.shared("locked")
    folder.mkdir(exist_ok=True)
    group.shared("locked")
    with storage.writer_lock(folder) if group.rank == 0 else open(folder / ".lock", "a"):
        group.shared("locked")
        with pytest.raises(RuntimeError, match="another process is writing"):
            state.save(folder)
    group.shared("locked")
    state.save(folder)


def models_that_do_not_fit(group: Group) -> None:
    spread = group.small
    state, _ = unified(spread)
    folder = group.shared("fit")
    state.save(folder)
    good = spread.shard(spread.base())
    for wrong, error, text in (
        ({n: t for n, t in good.items() if n != "uneven"}, KeyError, "'uneven' is missing"),
        (good | {"uneven": good["vector"]}, ValueError, r"'uneven': shape \(10,\)"),
        (good | {"head.weight": good["vector"]}, ValueError, r"'head.weight': shape \(10,\)"),
    ):
        given = wrong if group.last else good
        with pytest.raises(error, match=text):
            cx.UnifiedDelta.load(folder, like=given)
    if group.world > 1:
        given = good | {"uneven": spread.base()["uneven"]} if group.last else good
        with pytest.raises(ValueError, match=r"the processes differ in tensor 'uneven'"):
            cx.UnifiedDelta.load(folder, like=given)
        given = good | {"head.weight": state.private("task 1")["head.weight"].full_tensor()}
        with pytest.raises(ValueError, match=r"differ in the private tensors of task 'task 1'"):
            cx.UnifiedDelta.load(folder, like=given if group.last else good)
    unused = DTensor.from_local(torch.ones(4), group.mesh, [Partial()], run_check=False)
    loaded = cx.UnifiedDelta.load(folder, like={"unused": unused} | good)
    assert loaded.spec.private == PRIVATE


def another_base(group: Group) -> None:
    """One process's part of the base differs: all see it."""
    spread = group.small
    state, whole = unified(spread)
    base = spread.shard(spread.base())
    with pytest.raises(ValueError, match="call record_base"):
        state.verify_base(base)
    state.record_base(base, "tiny")
    whole.record_base(spread.base(), "tiny")
    whole.verify_base(spread.base())
    part = local(base["columns"])
    if group.rank == 0:
        part[0, 0] += 1
    with pytest.raises(ValueError, match=r"'columns': differs from the base model \(tiny\)"):
        state.verify_base(base)
    if group.world == 1:
        return
    for name in ("plain", "replicated"):
        base = spread.shard(spread.base())
        if group.last:
            local(base[name])[0, 0] += 1
        for call in (state.verify_base, state.record_base):
            with pytest.raises(ValueError, match=rf"differ in tensor '{name}' \(fingerprint\)"):
                call(base)
    base = spread.shard(spread.base())
    if group.last:
        base["uneven"] = base["uneven"].bfloat16()
    with pytest.raises(ValueError, match=r"differ in tensor 'uneven' .*float32.*bfloat16"):
        state.verify_base(base)


STORAGE: tuple[Case, ...] = (
    files_of_one_process,
    read_in_parts,
    read_by_other_processes,
    full_disk,
    failures_between_two_gathers,
    clean_up_that_fails,
    damaged_file,
    another_writer,
    models_that_do_not_fit,
    another_base,
)
