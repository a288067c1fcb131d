"""`condu bench`: what is measured, the baselines, and what becomes of what does not fit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import condu_ext as cx
from condu.bench import check, suite, sums
from condu.bench.baselines import BASELINES
from condu.bench.baselines.compiled import PART
from condu.bench.baselines.flat import GROUP, groups
from condu.bench.cases import OPERATIONS, PRECISIONS, Case, cases_of
from condu.bench.ceiling import Copy, huge_pages
from condu.bench.check import WrongBaseline, WrongResult, different_elements, sample
from condu.bench.inputs import Inputs, task_name
from condu.bench.measure import Times, paired, repeated
from condu.bench.memory import available_memory, peak_memory
from condu.bench.operation import operation_of
from condu.bench.shapes import MODELS, largest, parameters
from condu.bench.suite import FAILED, MEASURED, NO_MEMORY, WRONG, Settings, Suite

CPU = torch.device("cpu")
TOY = {"weight": (33, 65), "empty": (0, 3), "scalar": (), "kernel": (5, 3, 2, 2), "bias": (513,)}


@pytest.fixture(autouse=True)
def _toy(monkeypatch: pytest.MonkeyPatch) -> None:
    """A model of odd sizes, and groups that cut its tensors."""
    monkeypatch.setitem(MODELS, "toy", lambda: dict(TOY))
    monkeypatch.setitem(GROUP, "cpu", 1000)
    monkeypatch.setattr("condu.bench.inputs.POOL", 100_003)
    monkeypatch.setattr("gc.collect", lambda: 0)  # slow among all that pytest keeps


def inputs_of(case: Case) -> Inputs:
    return Inputs(case.shapes, case.dtypes, CPU)


def toy_suite(**settings: Any) -> Suite:
    settings = {"baselines": (), "repeats": 2, "copy_bytes": 1 << 16} | settings
    return Suite(Settings(CPU, **settings), lambda _: None)


# ---- shapes --------------------------------------------------------------------------------------


@pytest.mark.parametrize("model", ["ViT-B-16", "ViT-L-14", "ViT-bigG-14"])
def test_clip_models_have_the_parameters_of_open_clip(model: str) -> None:
    open_clip = pytest.importorskip("open_clip")
    with torch.device("meta"):
        made = open_clip.model.CLIP(**open_clip.get_model_config(model))
    expected = {name: tuple(p.shape) for name, p in made.named_parameters()}
    assert list(MODELS[model]().items()) == list(expected.items())


@pytest.mark.parametrize(
    ("model", "expected"),
    [
        ("ViT-B-16", 149_620_737),
        ("ViT-L-14", 427_616_513),
        ("ViT-bigG-14", 2_539_567_105),
        ("Llama-2-7B", 6_738_415_616),
    ],
)
def test_models_have_their_published_sizes(model: str, expected: int) -> None:
    assert parameters(MODELS[model]()) == expected


# ---- cases ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("operation", "precision", "bytes_a_parameter"),
    [
        ("unify", "fp32", 4 * 9 + 4 + 1),
        ("unify", "bf16", 2 * 9 + 4 + 1),
        ("absorb", "fp32", 16 + 17 / 8),
        ("absorb_", "bf16/bf16", 8 + 17 / 8),
        ("absorb_+check", "fp16", 4 + 8 + 17 / 8),
        ("decouple_", "fp32", 12 + 1 / 8),
        ("decouple_", "bf16", 4 + 4 + 1 / 8),
        ("merge", "bf16/bf16", 6 + 2),
    ],
)
def test_floors_of_eight_tasks(operation: str, precision: str, bytes_a_parameter: float) -> None:
    case = Case(operation, "ViT-B-16", 8, precision)
    assert case.floor_bytes == int(149_620_737 * bytes_a_parameter)


def test_a_state_of_tasks_takes_what_the_case_says() -> None:
    case = Case("absorb", "tiny", 3, "fp32")
    inputs = inputs_of(case)
    new = cx.absorb(inputs.state(3), "new", inputs.newcomer(3), inputs.pretrained)
    padding = 512 * len(case.shapes) * (4 + 4 / 8)
    assert case.result_bytes <= new.nbytes <= case.result_bytes + padding + 10_000


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ((["fuse"], ["tiny"], [2], ["fp32"]), "unknown operation 'fuse'; there are absorb, "),
        ((["unify"], ["ViT-Z"], [2], ["fp32"]), "unknown model 'ViT-Z'; there are tiny, "),
        ((["unify"], ["tiny"], [2], ["int8"]), "unknown dtype 'int8'; there are fp32, "),
        ((["merge"], ["tiny"], [1], ["fp32"]), "merge needs at least 2 tasks, not 1"),
        ((["unify"], ["tiny"], [0], ["fp32"]), "unify needs at least 1 tasks, not 0"),
        ((["unify"], ["tiny"], [], ["fp32"]), "there is nothing to measure"),
    ],
)
def test_wrong_cases_are_refused(values: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        cases_of(*values)


def test_cases_that_share_inputs_are_neighbours() -> None:
    cases = cases_of(["unify", "absorb", "merge", "decouple_"], ["toy"], [8, 2], ["fp32"])
    order = [(case.operation, case.tasks) for case in cases]
    assert order == [
        ("absorb", 2),
        ("decouple_", 2),
        ("absorb", 8),
        ("decouple_", 8),
        ("unify", 2),
        ("unify", 8),
        ("merge", 2),
        ("merge", 8),
    ]


# ---- inputs --------------------------------------------------------------------------------------


def test_inputs_are_random_and_differ_between_tasks() -> None:
    inputs = inputs_of(Case("unify", "toy", 3))
    models = inputs.models(3)
    deltas = torch.stack(
        [
            model["weight"].view(-1) - inputs.pretrained["weight"].view(-1)
            for model in models.values()
        ]
    )
    assert 0.9e-3 < float(deltas.std()) < 1.1e-3
    assert (deltas != 0).float().mean() > 0.999
    assert torch.corrcoef(deltas).fill_diagonal_(0).abs().max() < 0.1


def test_a_state_grows_shrinks_and_holds_the_same_tasks() -> None:
    inputs = inputs_of(Case("absorb", "toy", 3))
    fresh = inputs.state(2)
    grown = inputs.state(4)
    assert grown is fresh
    assert inputs.state(2).tasks == (task_name(0), task_name(1))
    a, b = inputs.halves(5)
    assert (*a.tasks, *b.tasks) == tuple(task_name(t) for t in range(5))


# ---- baselines -----------------------------------------------------------------------------------


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("tasks", [2, 5])
@pytest.mark.parametrize("operation", ["unify", "absorb", "merge", "decouple_"])
def test_baselines_agree_with_the_kernels(operation: str, tasks: int, precision: str) -> None:
    case = Case(operation, "toy", tasks, precision)
    bound = operation_of(case, inputs_of(case))
    result = bound.run(bound.prepare())
    assert bound.check(result) == parameters(TOY)
    for name in ("straightforward", "eager"):
        baseline = BASELINES[name]
        theirs = bound.baseline(baseline)()
        named = theirs if isinstance(theirs, dict) else baseline.named(theirs)
        assert different_elements(result, named, name) == 0


def test_the_compiled_formulas_agree_with_the_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """Uncompiled: what inductor makes of them is checked whenever it is measured."""
    monkeypatch.setattr("condu.bench.baselines.compiled._compiled", lambda function: function)
    monkeypatch.setattr("condu.bench.baselines.formulas.WORD", 3)
    monkeypatch.setitem(PART, "cpu", 1000)
    baseline = BASELINES["compile"]
    for precision in PRECISIONS:
        for operation in ("unify", "absorb", "merge", "decouple_"):
            case = Case(operation, "toy", 7, precision)
            bound = operation_of(case, inputs_of(case))
            result, theirs = bound.run(bound.prepare()), bound.baseline(baseline)()
            named = theirs if isinstance(theirs, dict) else baseline.named(theirs)
            assert different_elements(result, named, str(case)) == 0


def test_groups_cover_the_model_in_order() -> None:
    found = list(groups(TOY, CPU))
    assert [g.size for g in found] == [1000, 1000, 719]
    assert [g.part.start for g in found] == [0, 1000, 2000]
    flat = torch.arange(parameters(TOY))
    sizes = [int(torch.Size(shape).numel()) for shape in TOY.values()]
    model = {n: p.view(TOY[n]) for n, p in zip(TOY, flat.split(sizes), strict=True)}
    assert torch.equal(torch.cat([part for g in found for part in g.of(model)]), flat)


@pytest.mark.parametrize("name", ["straightforward", "eager"])
@pytest.mark.parametrize("operation", ["unify", "absorb"])
def test_estimated_memory_is_near_what_a_baseline_takes(name: str, operation: str) -> None:
    case = Case(operation, "tiny", 8)
    bound, baseline = operation_of(case, inputs_of(case)), BASELINES[name]
    with peak_memory(CPU) as peak:
        bound.baseline(baseline)()
    estimate = baseline.extra_bytes(case, CPU)
    assert peak.extra is not None
    assert 0.4 * estimate < peak.extra < 1.2 * estimate + (8 << 20)


# ---- checking ------------------------------------------------------------------------------------


def test_the_sample_has_start_middle_and_end_of_every_tensor(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(check, "SAMPLE", 2048)
    monkeypatch.setitem(TOY, "weight", (3, 1111))
    parts = sample(TOY)
    assert parts["weight"] == [slice(0, 512), slice(1024, 1536), slice(2560, 3333)]
    assert parts["empty"] == [slice(0, 0)]
    assert parts["bias"] == [slice(0, 513)]
    assert sample({"a": (2560,), "b": (2561,)}) == {
        "a": [slice(0, 2560)],
        "b": [slice(0, 512), slice(1024, 1536), slice(2048, 2561)],
    }
    for operation in OPERATIONS:
        case = Case(operation, "toy", 3)
        bound = operation_of(case, inputs_of(case))
        assert bound.check(bound.run(bound.prepare())) == sum(
            p.stop - p.start for slices in parts.values() for p in slices
        )
        for element in (0, 511, 1024, 1535, 2560, 3332):
            result = bound.run(bound.prepare())
            values = result if operation == "decouple_" else result.delta
            values["weight"].view(-1)[element] += 1e-6
            with pytest.raises(WrongResult, match="tensor weight"):
                bound.check(result)


@pytest.mark.parametrize("operation", OPERATIONS)
def test_a_wrong_result_is_found(operation: str) -> None:
    case = Case(operation, "toy", 3)
    bound = operation_of(case, inputs_of(case))
    result = bound.run(bound.prepare())
    values = result if operation == "decouple_" else result.delta
    values["bias"][512] += 1e-6
    with pytest.raises(WrongResult, match="tensor bias"):
        bound.check(result)


@pytest.mark.parametrize("operation", [name for name in OPERATIONS if name != "decouple_"])
@pytest.mark.parametrize(
    ("broken", "message"),
    [
        ("den", "tensor bias: .*: sum of M.u. is .*, in float64 "),
        ("num", "tensor bias: .*: sum of .d. is .*, in float64 "),
        ("rescaler", ": rescaler of .* is .*, in float64 "),
    ],
)
def test_wrong_sums_are_found(operation: str, broken: str, message: str) -> None:
    case = Case(operation, "toy", 3, "bf16/bf16")
    bound = operation_of(case, inputs_of(case))
    result = bound.run(bound.prepare())
    bound.check(result)
    position = list(TOY).index("bias")
    getattr(result.arenas[0], broken)[-1, position if broken != "rescaler" else 0] *= 1 + 1e-5
    with pytest.raises(WrongResult, match=message):
        bound.check(result)


def test_sums_are_checked_of_the_largest_and_the_smallest_tensors(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(sums, "SAMPLE", 62)
    monkeypatch.setattr(sums, "PART", 64)
    case = Case("absorb_", "toy", 3)
    bound = operation_of(case, inputs_of(case))
    result = bound.run(bound.prepare())
    norms = {(task, name): num for (task, name), (num, _) in sums.sums_of(result).items()}
    sums.require_sums(result, lambda task, name: norms[task, name], "toy")
    sizes = {name: u.numel() for name, u in result.delta.items()}
    assert sums.summed_tensors(sizes) == ["weight", "empty", "scalar", "kernel"]
    result.arenas[0].den[0, 0] *= 1 + 1e-5
    with pytest.raises(WrongResult, match=r"toy, tensor weight: task 0: sum of M\|u\| is"):
        sums.require_sums(result, lambda task, name: norms[task, name], "toy")


def test_a_wrong_mask_bit_is_found() -> None:
    case = Case("absorb", "toy", 3)
    bound = operation_of(case, inputs_of(case))
    result = bound.run(bound.prepare())
    result.arenas[0].planes[2][0] ^= 8
    with pytest.raises(WrongResult, match="tensor weight: mask 2"):
        bound.check(result)


def test_a_baseline_that_differs_is_counted_and_beyond_rounding_refused() -> None:
    case = Case("unify", "toy", 3)
    bound, baseline = operation_of(case, inputs_of(case)), BASELINES["eager"]
    result, theirs = bound.run(None), bound.baseline(baseline)()
    theirs.delta["bias"][:2] *= 2
    theirs.masks[1]["bias"][2] ^= True
    assert different_elements(result, theirs, "eager") == 3
    theirs.delta["weight"] *= 2
    with pytest.raises(WrongBaseline, match=r"eager: \d+ of 2719 elements") as caught:
        different_elements(result, theirs, "eager")
    assert caught.value.different is not None
    assert caught.value.different > 2000
    theirs.rescalers[1] *= 1.001
    with pytest.raises(WrongBaseline, match="eager: rescaler of task 1 is"):
        different_elements(result, theirs, "eager")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_experts_may_be_rounded_once_where_a_compiler_contracts(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    theta_0 = (0.02 * torch.randn(100_000, generator=generator)).to(dtype)
    u = 1e-3 * torch.randn(100_000, generator=generator)
    ours = {"w": (theta_0.float() + 1.3 * u).to(dtype)}
    fused = (theta_0.double() + torch.tensor(1.3).double() * u.double()).float().to(dtype)
    near = different_elements(ours, {"w": fused}, "compile", {"w": theta_0})
    assert (near > 1000) == (dtype == torch.float32)
    if dtype == torch.float32:
        with pytest.raises(WrongBaseline, match="elements"):
            different_elements(ours, {"w": fused}, "eager")
    wrong = ours["w"].clone()
    wrong[:50] += 4 * torch.finfo(dtype).eps * (1 + wrong[:50].abs())
    wrong[50] = torch.nan
    with pytest.raises(WrongBaseline, match="compile: 51 of 100000"):
        different_elements(ours, {"w": wrong}, "compile", {"w": theta_0})


def test_a_wrong_kernel_is_a_row_and_the_next_is_measured(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def flipped(*arguments: Any, **options: Any) -> cx.UnifiedDelta:
        state = unify(*arguments, **options)
        state.delta["weight"][3] *= -1
        return state

    unify = cx.unify
    monkeypatch.setattr(cx, "unify", flipped)
    wrong, right = toy_suite().run([Case("unify", "toy", 2), Case("absorb", "toy", 2)])
    assert (wrong.status, wrong.seconds) == (WRONG, None)
    assert "differs from the reference in 65 of 2145" in wrong.reason
    assert right.status == MEASURED


def test_a_wrong_baseline_is_a_failed_row(monkeypatch: pytest.MonkeyPatch) -> None:
    def flipped(*arguments: Any) -> Any:
        state = unify(*arguments)
        state.delta["weight"][3] *= -1
        return state

    unify = BASELINES["eager"].unify
    monkeypatch.setattr(BASELINES["eager"], "unify", flipped)
    result = toy_suite(baselines=("eager",)).measure(Case("unify", "toy", 2))
    assert result.status == MEASURED
    failed = result.baselines["eager"]
    assert (failed.status, failed.seconds, failed.different) == (FAILED, None, 65)
    assert "65 of 2719 elements are not the kernel's" in failed.reason


# ---- measuring -----------------------------------------------------------------------------------


def test_percentiles() -> None:
    assert Times.of([5.0, 1.0, 2.0, 3.0, 4.0]) == Times(
        3.0, pytest.approx(1.8), pytest.approx(4.2), 5
    )


def test_kernel_and_copy_take_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    log: list[str] = []
    copy = Copy(CPU, 1 << 12)
    monkeypatch.setattr(Copy, "__call__", lambda _: log.append("copy"))

    def prepare() -> str:
        log.append("prepare")
        return "argument"

    found = paired(prepare, lambda argument: log.append(argument), 1, copy, CPU, 2)
    assert log == ["prepare", "argument", "copy"] + 2 * ["prepare", "copy", "argument"]
    assert found.kernel.runs == found.copy.runs == 2
    assert found.ratio > 0


def test_the_copy_copies() -> None:
    copy = Copy(CPU, 1 << 12)
    copy()
    assert torch.equal(copy.source, copy.target)
    assert copy.source.count_nonzero() == copy.source.numel()
    assert copy.moved == 1 << 13


@pytest.mark.skipif(huge_pages() is None, reason="a system without transparent huge pages")
def test_the_copy_may_have_huge_pages() -> None:
    copy = Copy(CPU, 1 << 22)
    for tensor in (copy.source, copy.target):
        assert "hg" in flags_of_pages(tensor.data_ptr())


def flags_of_pages(address: int) -> list[str]:
    """What the system says of the mapping that an address lies in."""
    inside = False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        words = line.split()
        if not words[0].endswith(":"):
            start, end = (int(number, 16) for number in words[0].split("-"))
            inside = start <= address < end
        elif inside and words[0] == "VmFlags:":
            return words[1:]
    return []


def test_calls_stop_when_their_time_is_up() -> None:
    assert len(repeated(lambda: None, lambda _: None, CPU, 4, budget=100.0)) == 4
    assert len(repeated(lambda: None, lambda _: None, CPU, 4, budget=0.0)) == 1


@pytest.mark.parametrize("compiles", [False, True])
def test_a_slow_baseline_is_called_once_after_compiling(
    compiles: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    def counted(*arguments: Any) -> Any:
        calls.append(1)
        return unify(*arguments)

    calls: list[int] = []
    eager = BASELINES["eager"]
    unify = eager.unify
    monkeypatch.setattr(eager, "unify", counted)
    monkeypatch.setattr(eager, "compiles", compiles)
    toy_suite(baselines=("eager",), patience=0.0).measure(Case("unify", "toy", 2))
    assert len(calls) == 1 + compiles


def test_a_slow_baseline_has_one_call() -> None:
    result = toy_suite(baselines=("eager",), patience=0.0).measure(Case("unify", "toy", 2))
    assert result.baselines["eager"].seconds is not None
    assert result.baselines["eager"].seconds.runs == 1
    assert result.seconds is not None
    assert result.seconds.runs == 2


@pytest.mark.parametrize("operation", OPERATIONS)
def test_a_suite_measures_every_operation(operation: str) -> None:
    result = toy_suite(baselines=("eager",)).measure(Case(operation, "toy", 3, "bf16"))
    assert result.status == MEASURED
    assert result.checked == parameters(TOY)
    assert result.baselines["eager"].status == MEASURED
    assert result.baselines["eager"].different == 0


# ---- memory --------------------------------------------------------------------------------------


def test_what_does_not_fit_is_a_row() -> None:
    case = Case("unify", "tiny", 8)
    own = toy_suite(memory=0)
    fixed = -own.memory
    fits = case.resident_bytes + BASELINES["eager"].extra_bytes(case, CPU)
    memory = int((fits + fixed) / (1 - suite.RESERVE)) + (1 << 20)
    limited = toy_suite(memory=memory, baselines=("straightforward", "eager"))
    result = limited.measure(case)
    assert result.status == MEASURED
    assert result.baselines["eager"].status == MEASURED
    missing = result.baselines["straightforward"]
    assert (missing.status, missing.seconds) == (NO_MEMORY, None)
    assert "needs about" in missing.reason

    none = own.measure(case)
    assert (none.status, none.seconds, none.needed_bytes) == (NO_MEMORY, None, case.resident_bytes)
    assert none.reason.startswith("needs 0.0 GiB, there are -")


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried\nmore"), NO_MEMORY),
        (torch.OutOfMemoryError("CUDA out of memory"), NO_MEMORY),
        (RuntimeError("no C++ compiler\nmore"), FAILED),
    ],
)
def test_a_baseline_that_breaks_is_a_row(
    error: Exception, status: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: Any) -> None:
        raise error

    monkeypatch.setattr(BASELINES["eager"], "unify", broken)
    result = toy_suite(baselines=("eager",)).measure(Case("unify", "toy", 2))
    assert result.status == MEASURED
    assert result.baselines["eager"].status == status
    assert result.baselines["eager"].reason == str(error).splitlines()[0]


def test_memory_that_is_taken_shows() -> None:
    before = available_memory(CPU)
    assert before > 0
    with peak_memory(CPU) as peak:
        kept = torch.ones(16 << 20)
    assert peak.extra is not None
    assert kept.nbytes <= peak.extra < kept.nbytes + (8 << 20)


def test_a_peak_that_the_system_hides_is_none(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("condu.bench.memory._CLEAR", tmp_path / "missing" / "clear_refs")
    result = toy_suite().measure(Case("unify", "toy", 2))
    assert (result.status, result.peak_extra_bytes) == (MEASURED, None)


def test_a_control_group_s_page_cache_is_not_used_memory(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("condu.bench.memory._CGROUP", tmp_path)
    free = available_memory(CPU)  # without the files, as under version 1
    (tmp_path / "memory.max").write_text("1000000\n")
    (tmp_path / "memory.current").write_text("900000\n")
    (tmp_path / "memory.stat").write_text("anon 5\ninactive_file 300000\nactive_file 100000\n")
    assert available_memory(CPU) == 1_000_000 - 900_000 + 400_000 < free
    (tmp_path / "memory.max").write_text("max\n")
    assert available_memory(CPU) > 1_000_000


def test_the_largest_tensor() -> None:
    assert largest(TOY) == 33 * 65
