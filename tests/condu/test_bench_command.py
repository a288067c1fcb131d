"""`condu bench` from the command line, its files, and the README's table made of them."""

from __future__ import annotations

import errno
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from PIL import Image
from typer.testing import CliRunner, Result

import condu_ext as cx
from condu.bench import command
from condu.bench.cases import OPERATIONS, Case
from condu.bench.plot import figure_of, save_plot
from condu.bench.record import FORMAT, read_record
from condu.bench.shapes import MODELS
from condu.bench.suite import NO_MEMORY
from condu.bench.table import digits, legend, lines_of, table
from condu.cli import app

ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def _toy(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(MODELS, "toy", lambda: {"weight": (40, 70), "bias": (3,)})
    monkeypatch.setattr("condu.bench.inputs.POOL", 100_003)
    monkeypatch.setattr("gc.collect", lambda: 0)  # slow among all that pytest keeps
    monkeypatch.chdir(tmp_path)


def bench(*arguments: object) -> Result:
    return CliRunner().invoke(app, ["bench", *(str(argument) for argument in arguments)])


def refused(*arguments: object) -> str:
    result = bench(*arguments)
    assert result.exit_code == 2, result.output
    (line,) = result.stderr.splitlines()
    return line


def case_of(**changes: Any) -> dict[str, Any]:
    """A case of a record."""
    seconds = {"median": 0.2, "p20": 0.1, "p80": 0.3, "runs": 9}
    slow = {"median": 10.0, "p20": 10.0, "p80": 10.0, "runs": 1}
    case = {
        "operation": "absorb_",
        "model": "ViT-B-16",
        "parameters": 149_620_737,
        "tasks": 8,
        "dtype": "fp32",
        "floor_bytes": 2_500_000_000,
        "status": "measured",
        "seconds": seconds,
        "bytes_per_second": 12_500_000_000,
        "ratio": 0.876,
        "peak_extra_bytes": 18 << 20,
        "checked": 1000,
        "baselines": {
            "straightforward": {
                "status": "measured",
                "seconds": slow,
                "speedup": 50,
                "different": 2,
            },
            "compile": {"status": "out of memory", "seconds": None, "speedup": None},
        },
    }
    return case | changes


def record_with(*cases: dict[str, Any], **changes: Any) -> dict[str, Any]:
    machine = {"cpu": "Abacus 3", "cores": 4, "threads": 2, "isa": "avx2", "gpu": None}
    record = {
        "format": FORMAT,
        "date": "2026-11-20",
        "commit": "abc+",
        "machine": machine | {"torch": "2.9", "condu": "0.1"},
        "device": "cpu",
        "settings": {
            "repeats": 9,
            "baselines": ["straightforward", "compile"],
            "patience_seconds": 5.0,
        },
        "copy": {"how": "beads", "bytes_moved": 10**9, "bytes_per_second": 2e10},
        "cases": list(cases),
    }
    return record | changes


# ---- the command ---------------------------------------------------------------------------------


def test_quick_measures_and_writes_everything() -> None:
    result = bench("--quick", "--models", "toy", "--tasks", "3", "--out", "found")
    assert result.exit_code == 0, result.output
    assert "[6/6] unify toy fp32 T=3: " in result.stdout
    for name in ("bench.json", "bench.md", "bench.png"):
        assert f"found/{name}" in result.stdout
    assert Path("found/bench.md").read_text().strip() in result.stdout
    with Image.open("found/bench.png") as picture:
        assert picture.width > 1000

    record = read_record(Path("found/bench.json"))
    assert set(record) == {
        "format",
        "date",
        "commit",
        "machine",
        "device",
        "settings",
        "copy",
        "cases",
    }
    machine = record["machine"]
    assert all(machine[key] for key in ("cpu", "cores", "isa", "threads", "torch", "condu"))
    assert machine["gpu"] is None
    assert record["copy"]["bytes_per_second"] > 0
    assert [case["operation"] for case in record["cases"]] == list(OPERATIONS)
    for case in record["cases"]:
        expected = Case(case["operation"], "toy", case["tasks"])
        assert case["floor_bytes"] == expected.floor_bytes
        assert case["checked"] == case["parameters"] == 2803
        assert case["seconds"]["p20"] <= case["seconds"]["median"] <= case["seconds"]["p80"]
        assert case["bytes_per_second"] == case["floor_bytes"] / case["seconds"]["median"]
        assert set(case["baselines"]) == {"straightforward", "eager"}
        for baseline in case["baselines"].values():
            quotient = baseline["seconds"]["median"] / case["seconds"]["median"]
            assert (baseline["status"], baseline["speedup"]) == ("measured", quotient)
            assert baseline["different"] == 0


def test_folders_are_numbered_and_baselines_can_be_left_out() -> None:
    options = ("--quick", "--models", "toy", "--ops", "decouple_", "--tasks", 1, "--no-baselines")
    for name in ("bench", "bench-2"):
        assert bench(*options).exit_code == 0
        assert read_record(Path("runs", name, "bench.json"))["cases"][0]["baselines"] == {}


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("--ops", "fuse", "error: unknown operation 'fuse'; there are absorb, absorb_, "),
        ("--models", "ViT-Z", "error: unknown model 'ViT-Z'; there are tiny, ViT-B-16, "),
        ("--dtypes", "int8", "error: unknown dtype 'int8'; there are fp32, bf16, "),
        ("--tasks", "two", "error: --tasks: expected numbers such as 2,8,16, not 'two'"),
        ("--tasks", "0", "error: absorb needs at least 1 tasks, not 0"),
        ("--tasks", ",", "error: there is nothing to measure"),
        ("--repeats", 0, "error: --repeats: at least 1, not 0"),
        ("--baselines", "numpy", "error: --baselines: unknown 'numpy'; there are straightforward"),
        ("--device", "tpu", "error: --device: cpu or cuda, not 'tpu'"),
    ],
)
def test_wrong_options_are_one_line(option: str, value: object, message: str) -> None:
    assert refused("--quick", option, value).startswith(message)


def test_a_gpu_that_is_not_there_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert refused("--device", "cuda") == "error: --device cuda: torch finds no GPU here"


def test_the_help_names_what_there_is() -> None:
    words = bench("--help").output
    for name in ("--ops", "--models", "--dtypes", "ViT-bigG-14", "absorb_+check", "bf16/bf16"):
        assert name in words
    assert set(OPERATIONS) <= set(command.Options().cases()[k].operation for k in range(6))


def test_without_matplotlib_the_picture_is_left_out() -> None:
    program = """
import sys
from importlib.abc import MetaPathFinder
class Missing(MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in EXTRA.keys() - {"pydantic"}:  # recent typer needs that itself
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
from condu.bench import inputs
from condu.bench.shapes import MODELS
from condu.cli import app
from condu.terminal import EXTRA
inputs.POOL = 1009
MODELS["toy"] = lambda: {"weight": (70,)}
sys.meta_path.insert(0, Missing())
app(sys.argv[1:])
"""
    options = ["bench", "--quick", "--models", "toy", "--tasks", "2", "--out", "found"]
    ran = subprocess.run(
        [sys.executable, "-c", program, *options], capture_output=True, text=True, check=False
    )
    assert ran.returncode == 0, ran.stderr
    assert 'no bench.png: it needs matplotlib, which comes with "condu[train]"' in ran.stdout
    assert {file.name for file in Path("found").iterdir()} == {"bench.json", "bench.md"}


def test_a_wrong_kernel_fails_the_command_and_keeps_the_other_cases(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def flipped(*arguments: Any, **options: Any) -> Any:
        state = absorb(*arguments, **options)
        state.delta["weight"][3] *= -1
        return state

    absorb = cx.absorb
    monkeypatch.setattr(cx, "absorb", flipped)
    options = ("--quick", "--models", "toy", "--tasks", 2, "--no-baselines", "--out", "found")
    result = bench(*options, "--ops", "absorb,decouple_")
    assert result.exit_code == 1
    assert "error: absorb toy fp32 T=2, tensor weight: unified delta differs" in result.stderr
    wrong, right = read_record(Path("found/bench.json"))["cases"]
    assert (wrong["status"], right["status"]) == ("wrong result", "measured")
    assert "| wrong result |" in Path("found/bench.md").read_text()


def test_what_was_measured_survives_a_case_that_breaks(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any, **__: Any) -> None:
        raise RuntimeError("the device is gone")

    monkeypatch.setattr(cx, "unify", broken)
    options = ("--quick", "--models", "toy", "--tasks", 2, "--no-baselines", "--out", "found")
    result = bench(*options, "--ops", "absorb,unify")
    assert result.exit_code != 0
    (case,) = read_record(Path("found/bench.json"))["cases"]
    assert (case["operation"], case["status"]) == ("absorb", "measured")
    assert [file.name for file in Path("found").iterdir()] == ["bench.json"]


# ---- tables and pictures -------------------------------------------------------------------------


def test_a_full_disk_names_the_file_and_keeps_what_was_written(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The second record does not fit: the first stays whole and no part of the second is left."""
    write_text, written = Path.write_text, []

    def until_full(path: Path, text: str) -> int:
        written.extend([path] * path.name.endswith(".part"))
        if len(written) == 2:
            write_text(path, text[:10])
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return write_text(path, text)

    monkeypatch.setattr(Path, "write_text", until_full)
    options = ("--models", "toy", "--ops", "absorb_", "--tasks", 2, "--dtypes", "fp32")
    result = bench("--quick", "--no-baselines", *options, "--out", "full")
    assert result.exit_code != 0
    assert "No space left on device" in result.stderr
    assert "bench.json" in result.stderr
    assert [file.name for file in Path("full").iterdir()] == ["bench.json"]
    assert len(read_record(Path("full/bench.json"))["cases"]) == 1


def test_a_row_has_every_number_once_rounded() -> None:
    header, _, row = table([case_of()], ["straightforward", "compile"])
    assert header.split("|")[-4].strip() == "× straightforward"
    assert row == (
        "| absorb_ | ViT-B-16 | fp32 | 8 | 200 | 100–300 | 2.50 | 12.5 | 88 | 50.0¹ "
        "| out of memory | 18 |"
    )


def test_what_did_not_fit_is_a_row_that_says_so() -> None:
    missing = dict.fromkeys(("seconds", "bytes_per_second", "ratio", "peak_extra_bytes", "checked"))
    rows = table([case_of(status=NO_MEMORY, baselines={}, **missing)], ["compile"])
    assert rows[2] == (
        "| absorb_ | ViT-B-16 | fp32 | 8 | out of memory | – | 2.50 | – | – | – | – |"
    )
    assert len({row.count("|") for row in rows}) == 1


def test_the_text_says_how_it_was_measured() -> None:
    text = "\n".join(lines_of(record_with(case_of())))
    assert text.startswith("Abacus 3, 2 of 4 cores, avx2, torch 2.9, condu 0.1, 2026-11-20, commit")
    for words in (
        "beads",
        "20.0 GB/s",
        "first, middle and last elements of every tensor (1,000 elements a case;",
        "straightforward 2",
        "reads them twice",
        "make a new state as `absorb` does",
        "¹ of a single timed call",
    ):
        assert words in text
    failed = {"status": "failed", "reason": "not right", "seconds": None, "speedup": None}
    text = "\n".join(lines_of(record_with(case_of(baselines={"compile": failed}))))
    assert "compile failed on absorb_ ViT-B-16 fp32 T=8: not right" in text
    assert "¹ one call: it took longer than 5 s" in "\n".join(lines_of(record_with(case_of())))
    fast = record_with(case_of(baselines={}))
    assert "¹ one call" not in "\n".join(lines_of(fast))


@pytest.mark.parametrize(
    ("value", "expected"), [(0.123, "0.12"), (1.005, "1.00"), (12.34, "12.3"), (1234.6, "1,235")]
)
def test_digits(value: float, expected: str) -> None:
    assert digits(value) == expected


@pytest.mark.parametrize("models", [1, 3])
def test_a_picture_of_any_number_of_models(models: int) -> None:
    cases = [
        case_of(model=f"model {k}", parameters=10 ** (7 + k), tasks=tasks, dtype=dtype)
        for k in range(models)
        for tasks in (2, 8)
        for dtype in ("fp32", "bf16/bf16")
    ]
    rates, times = figure_of(record_with(*cases)).axes
    assert len(times.patches) == 0
    assert [list(line.get_xdata()) for line in times.lines] == [[2, 8]]
    assert [list(line.get_ydata()) for line in times.lines] == [[200, 200]]
    *drawn, ceiling = rates.lines
    assert list(ceiling.get_ydata()) == [100, 100]
    if models == 1:
        assert [bar.get_height() for bar in rates.patches] == pytest.approx([87.6, 87.6])
    else:
        sizes = [case["parameters"] for case in cases[::4]]
        assert [list(line.get_xdata()) for line in drawn] == 2 * [sizes]
        assert {line.get_linestyle() for line in drawn} == {"-", ":"}


def test_a_picture_of_one_number_of_tasks_has_the_baselines_that_ran() -> None:
    cases = [case_of(), case_of(operation="unify")]
    _, times = figure_of(record_with(*cases)).axes
    assert [bar.get_height() for bar in times.patches] == [200, 10_000, 200, 10_000]
    assert len(times.get_legend().get_texts()) == 2


def test_a_picture_of_nothing_measured() -> None:
    record = record_with(case_of(status=NO_MEMORY, seconds=None))
    rates, times = figure_of(record).axes
    assert (len(rates.patches), len(times.patches), len(times.lines)) == (0, 0, 0)
    save_plot(record, Path("none.png"))
    with Image.open("none.png") as picture:
        assert picture.width > 1000


# ---- README --------------------------------------------------------------------------------------


@pytest.fixture
def readme_table() -> ModuleType:
    file = ROOT / "benchmarks" / "readme_table.py"
    spec = importlib.util.spec_from_file_location("readme_table", file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def save_record(name: str, record: dict[str, Any]) -> None:
    folder = Path("benchmarks", "results", name)
    folder.mkdir(parents=True)
    (folder / "bench.json").write_text(json.dumps(record))


def test_the_readme_of_this_checkout_is_what_the_records_say(readme_table: ModuleType) -> None:
    assert readme_table.main(["--check"], ROOT) == 0


def test_the_table_is_written_once_and_checked(readme_table: ModuleType) -> None:
    readme = Path("README.md")
    readme.write_text(f"before\n{readme_table.BEGIN}\nold\n{readme_table.END}\nafter\n")
    save_record("new", record_with(case_of(), case_of(operation="unify", tasks=2)))
    save_record("old", record_with(case_of(model="ViT-L-14"), date="2026-11-01"))
    nothing = {"how": "beads", "bytes_moved": 1, "bytes_per_second": None}
    save_record("other", record_with(case_of(operation="merge", tasks=2), copy=nothing))
    assert readme_table.main(["--check"], Path()) == 1
    assert readme_table.main([], Path()) == 0
    assert readme_table.main(["--check"], Path()) == 0
    text = readme.read_text()
    assert text.startswith("before\n")
    assert text.endswith("\nafter\n")
    assert "| absorb_ | ViT-B-16 | fp32 | 8 | 200 |" in text
    assert "| unify | ViT-B-16 | fp32 | 2 |" in text
    for left_out in ("| old", "ViT-L-14", "| merge |"):
        assert left_out not in text
    assert "benchmarks/results/new/bench.md" in text
    for note in legend():
        assert text.count(note) == 1
    assert "CUDA: not measured" in text


def test_markers_are_needed_and_other_formats_refused(readme_table: ModuleType) -> None:
    for text in ("nothing", f"{readme_table.END} {readme_table.BEGIN}", 2 * readme_table.BEGIN):
        with pytest.raises(ValueError, match=r"README.md: expected one "):
            readme_table.rewritten(text, [])
    Path("bench.json").write_text('{"rows": []}')
    with pytest.raises(ValueError, match=r"bench.json: not a benchmark record of format 1"):
        read_record(Path("bench.json"))
