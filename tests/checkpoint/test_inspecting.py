"""What `condu inspect` says, against counting masks of states in memory."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from small_states import SHAPES, TASKS, change_config, make_state, rewritten, save
from torch import Tensor
from typer.testing import CliRunner

import condu_ext as cx
from condu.checkpoint import inspecting
from condu.checkpoint.inspecting import group_of, inspect
from condu.state_commands import app
from condu_ext.manifest import read_manifest

GROUPS = {
    "vision.*.attn": ["vision.0.attn.w", "vision.0.attn.b", "vision.1.attn.w"],
    "conv": ["conv.w"],
    "text": ["text.w"],
    "scale": ["scale"],
    "none": ["none"],
}


def run(*arguments: Any) -> str:
    result = CliRunner().invoke(app, ["inspect", *map(str, arguments)], terminal_width=80)
    assert result.exit_code == 0, result.output
    return result.stdout


def mask(state: cx.UnifiedDelta, task: str, names: Any = SHAPES) -> Tensor:
    return torch.cat([state.mask(task)[name].reshape(-1) for name in names])


def share(bits: Tensor) -> float | None:
    return int(bits.sum()) / bits.numel() if bits.numel() else None


@pytest.mark.parametrize("cached", [1, 200, 1 << 20])
@pytest.mark.parametrize("rescale", ["global", "per_tensor"])
def test_numbers_are_those_of_the_masks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cached: int, rescale: str
) -> None:
    """However large the ranges are that are counted at a time."""
    monkeypatch.setattr(inspecting, "_CACHED", cached)
    state = make_state(rescale=rescale, dtype=torch.bfloat16)
    found = inspect(save(state, tmp_path))
    assert found.parameters == mask(state, "cars").numel()
    assert [(group.name, group.parameters) for group in found.groups] == [
        (name, mask(state, "cars", names).numel()) for name, names in GROUPS.items()
    ]
    for task, expected in zip(found.tasks, TASKS, strict=True):
        assert task.name == expected
        assert task.density == share(mask(state, expected))
        assert task.group_density == [share(mask(state, expected, n)) for n in GROUPS.values()]
        head = state.private(expected)["head"]
        assert (task.private_tensors, task.private_bytes) == (1, 8 * head.numel())
        lambdas = state.rescaler(expected)
        if isinstance(lambdas, dict):
            lambdas = {name: value for name, value in lambdas.items() if name != "none"}
            assert task.rescaler == (min(lambdas.values()), max(lambdas.values()))
            assert task.rescaler[0] < task.rescaler[1]
        else:
            assert task.rescaler == (lambdas, lambdas)
    for i, one in enumerate(TASKS):
        for k, other in enumerate(TASKS):
            a, b = mask(state, one), mask(state, other)
            assert found.agreement[i][k] == int((a & b).sum()) / int((a | b).sum())


def test_masks_are_read_by_ranges(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of all tasks together never more than a thread may hold."""
    cx.unify({f"task {k}": {"w": torch.randn(50_000)} for k in range(5)}, None).save(tmp_path)
    files, sizes = inspecting.StateFiles, []
    real = files.read_bits

    def read_bits(self: Any, *place: Any) -> None:
        sizes.append(place[-1].numel())
        real(self, *place)

    monkeypatch.setattr(files, "read_bits", read_bits)
    monkeypatch.setattr(inspecting, "_CACHED", 3000)
    inspect(tmp_path)
    assert sum(sizes) == 5 * 50_000 / 8
    assert 2000 < 5 * max(sizes) <= 3000


def test_more_bits_in_a_range_than_16_bits_count(tmp_path: Path) -> None:
    cx.unify({task: {"w": torch.ones(70_001)} for task in "ab"}, None).save(tmp_path)
    found = inspect(tmp_path)
    assert [task.density for task in found.tasks] == [1.0, 1.0]
    assert found.agreement == [[1.0, 1.0], [1.0, 1.0]]


def test_the_rest_is_as_config_and_files_have_it(tmp_path: Path) -> None:
    rule = cx.FusionRule("zero", "tensor_mean")
    save(cx.unify({"a": {"w": torch.ones(9)}}, None, rule=rule), tmp_path)
    found = inspect(str(tmp_path))
    assert (found.path, found.base_name, found.rule) == (str(tmp_path), None, rule)
    assert (found.dtype, found.generation, found.format_version) == ("float32", 1, 1)
    assert found.library_version == cx.__version__
    on_disk = {
        kind: sum(file.stat().st_size for file in tmp_path.glob(f"{kind}-*"))
        for kind in ("unified", "triggers", "private")
    }
    assert found.sizes == inspecting.Sizes(**on_disk, total=sum(on_disk.values()))
    assert found.bytes_per_parameter == found.sizes.total / found.parameters
    assert found.zero_sums is None
    assert found.tasks[0].private_tensors == 0


def test_exact_ties(tmp_path: Path) -> None:
    manifest = read_manifest(save(make_state(), tmp_path))
    counts = [3, 2, 5, 7, 11, 1, 0]
    (tmp_path / "config.json").write_text(replace(manifest, zero_sums=counts).to_json())
    found = inspect(tmp_path)
    assert found.zero_sums == 29
    assert [group.zero_sums for group in found.groups] == [3 + 2 + 5, 7, 11, 1, 0]
    assert "29 (1.1 % of the parameters)" in run(tmp_path)


def test_group_names() -> None:
    for name, group in {
        "model.layers.0.self_attn.q_proj.weight": "model.layers.*.self_attn.q_proj",
        "layer1.0.conv1.weight": "layer1.*.conv1",
        "layers.11": "layers",
        "logit_scale": "logit_scale",
        "": "",
    }.items():
        assert group_of(name) == group


@pytest.mark.filterwarnings("ignore:task 'still'")
def test_masks_without_bits(tmp_path: Path) -> None:
    """A task that did not move, and one that was outvoted: no division by zero."""
    models = {
        "still": {"w": torch.zeros(9)},
        "weak": {"w": torch.ones(9)},
        "strong": {"w": torch.full((9,), -3.0)},
    }
    with pytest.warns(UserWarning, match="weak"):
        cx.unify(models, None).save(tmp_path)
    found = inspect(tmp_path)
    assert [task.rescaler for task in found.tasks[:2]] == [(0.0, 0.0)] * 2
    assert [task.density for task in found.tasks] == [0.0, 0.0, 1.0]
    assert found.agreement == [[None, None, 0.0], [None, None, 0.0], [0.0, 0.0, 1.0]]


def test_bits_past_the_end_do_not_count(tmp_path: Path) -> None:
    before = inspect(save(make_state(), tmp_path))
    with rewritten(tmp_path, "triggers-1-0", "vision.0.attn.b") as tensors:
        tensors["vision.0.attn.b"][-1] |= 0b1111_1110
    after = inspect(tmp_path)
    assert (after.tasks, after.agreement) == (before.tasks, before.agreement)


def test_json_has_everything(tmp_path: Path) -> None:
    save(make_state(rescale="per_tensor"), tmp_path)
    change_config(tmp_path, lambda config: config["tasks"][0].update(name="\ud800 \x1b[2J"))
    values = json.loads(run(tmp_path, "--json"))
    assert values == json.loads(json.dumps(inspect(tmp_path).as_dict()))
    assert values["tasks"][0]["name"] == "\ud800 \x1b[2J"
    assert values["rule"] == {"zero_sum": "negative", "rescale": "per_tensor"}


def test_tables_of_few_tasks(tmp_path: Path) -> None:
    save(make_state(), tmp_path)
    change_config(tmp_path, lambda config: config["tasks"][0].update(name="[red]\x1b[2J"))
    text = run(tmp_path)
    assert all(word in text for word in ("tiny", "2,550 parameters in 7 tensors", "not counted"))
    found = inspect(tmp_path)
    assert r"[red]\x1b[2J" in text
    assert "\x1b" not in text
    for task in found.tasks:
        assert f"{task.rescaler[0]:.4f}" in text
        assert f"{100 * task.density:.1f}" in text
    first = re.search(r"^ 1 +– +(\S+) +(\S+)", text, re.MULTILINE)
    assert first is not None
    assert first.groups() == tuple(f"{100 * a:.1f}" for a in found.agreement[0][1:])


def test_a_hundred_tasks_stay_readable(tmp_path: Path) -> None:
    """Eighty columns; instead of the matrix the pairs that agree most and least."""
    generator = torch.Generator().manual_seed(0)
    deltas = {f"task {k}": {"a.w": torch.randn(999, generator=generator)} for k in range(100)}
    deltas["task 98"] = {"a.w": deltas["task 7"]["a.w"] * 1.5}
    cx.unify(deltas, None).save(tmp_path)
    found = inspect(tmp_path)
    assert found.agreement[98][7] == 1.0
    text = run(tmp_path)
    assert max(map(len, text.splitlines())) <= 80
    assert len(text.splitlines()) < 100 + 50
    assert re.search(r"100\.0 +8 task 7 +99 task 98", text)
    lowest = min(a for row in found.agreement for a in row)
    assert text.rstrip().splitlines()[-1].split()[0] == f"{100 * lowest:.1f}"


def test_states_without_tasks(tmp_path: Path) -> None:
    cx.UnifiedDelta.empty({"w": torch.ones(3, 0)}).save(tmp_path)
    found = inspect(tmp_path)
    assert (found.tasks, found.agreement, found.bytes_per_parameter) == ([], [], None)
    assert "0 parameters in 1 tensors" in run(tmp_path)


def test_what_is_no_state_is_one_line(tmp_path: Path) -> None:
    for damage, text in (
        (lambda: None, "holds no unified checkpoint"),
        (lambda: (tmp_path / "config.json").write_text("{}"), "not a unified checkpoint"),
    ):
        damage()
        result = CliRunner().invoke(app, ["inspect", str(tmp_path)])
        assert result.exit_code == 2
        assert text in result.stderr
        assert len(result.stderr.splitlines()) == 1
