"""One answer, whatever computes it: instruction sets, threads, floating-point modes."""

from __future__ import annotations

import ctypes
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from isa_probe import cases, probe
from kernel_cases import BF16, F32, Case, digests, make_case, run

from condu_ext import _ops, build_info


def run_with(isa: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "CONDU_CPU_ISA": isa, "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, *arguments], env=environment, capture_output=True, text=True
    )


@pytest.fixture(scope="module")
def own_digests() -> dict[str, Any]:
    return probe()


@pytest.mark.parametrize("isa", ["avx512", "avx2", "baseline"])
def test_every_instruction_set_gives_the_same_bytes(isa: str, own_digests: dict[str, Any]) -> None:
    """Unified deltas, planes, weights and, unlike the reference, the sums too."""
    done = run_with(isa, str(Path(__file__).with_name("isa_probe.py")))
    if "names no instruction set of this machine" in done.stderr:
        pytest.skip(f"this machine has no {isa}")
    assert done.returncode == 0, done.stderr
    answer = json.loads(done.stdout)
    assert answer["isa"] == isa
    for name, expected in own_digests.items():
        wrong = [k for k, digest in expected.items() if answer["digests"][name][k] != digest]
        assert not wrong, f"{name}: {wrong}"


def test_ranges_give_the_same_bytes_on_every_instruction_set(own_digests: dict[str, Any]) -> None:
    """Here; the probe compares those of the others."""
    assert own_digests["in ranges"] == own_digests["mixed"]


def test_the_probe_sees_a_difference(own_digests: dict[str, Any]) -> None:
    """A digest that no input could change would make the test above pass for ever."""
    case = cases()["fp32"]
    case.models[0][-1][1000] += 1
    changed = digests(run(_ops, case))
    expected = own_digests["fp32"]
    assert changed["unify.u[0]"] != expected["unify.u[0]"]
    assert changed["unify.sums[0]"] != expected["unify.sums[0]"]


@pytest.mark.parametrize("isa", ["sse9", "AVX2"])
def test_unknown_instruction_set(isa: str) -> None:
    """Importing works; asking for the set or for any operation says what is wrong."""
    code = """
import torch, condu_ext
for call in (condu_ext.build_info, lambda: condu_ext.unify({"a": {"w": torch.ones(3)}}, None)):
    try:
        call()
    except ValueError as error:
        print(error)
"""
    done = run_with(isa, "-c", code)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert len(lines) == 2
    for line in lines:
        assert "CONDU_CPU_ISA" in line
        assert "avx512, avx2 or baseline" in line


# ---- threads -------------------------------------------------------------------------------------


@pytest.mark.parametrize("threads", [2, 3, 16])
@pytest.mark.parametrize(
    "sizes", [(1,), (5, 0, 3), (65536, 65536), (1, 200000, 7, 65537), (131072 + 17,)]
)
def test_threads_do_not_matter(threads: int, sizes: tuple[int, ...]) -> None:
    case = make_case(sizes, 3, "mixed", BF16)
    expected = digests(run(_ops, case))
    torch.set_num_threads(threads)
    assert digests(run(_ops, case)) == expected


# ---- floating-point modes of the process ---------------------------------------------------------


@contextmanager
def flushed_denormals() -> Iterator[None]:
    if not torch.set_flush_denormal(True):
        pytest.skip("this processor cannot flush denormals")
    try:
        yield
    finally:
        torch.set_flush_denormal(False)


@contextmanager
def rounding_up() -> Iterator[None]:
    """FE_UPWARD of x86-64's <fenv.h>, for the calling thread."""
    try:
        libm = ctypes.CDLL("libm.so.6")
    except OSError:
        pytest.skip("needs glibc's fesetround")
    if os.uname().machine != "x86_64":
        pytest.skip("FE_UPWARD has another value here")
    if libm.fesetround(0x800):
        pytest.skip("fesetround failed")
    try:
        yield
    finally:
        libm.fesetround(0)


def subnormal_case(kind: str) -> Case:
    """Deltas and products that are all subnormal in fp32."""
    case = make_case((33, 300), 5, kind)
    for model in (case.base, *case.models):
        for k, tensor in enumerate(model):
            if tensor.dtype == torch.float16:
                continue  # its subnormals are normal in fp32
            model[k] = (tensor.double() * 2.0**-130).to(tensor.dtype)
    return case


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("mode", [flushed_denormals, rounding_up])
def test_modes_of_the_process_do_not_matter(mode: Any, threads: int) -> None:
    torch.set_num_threads(threads)
    made = [subnormal_case(kind) for kind in ("fp32", "bf16")]
    made += [make_case((33, 70000), 2, kind) for kind in ("fp16", "mixed")]
    expected = [digests(run(_ops, case)) for case in made]
    with mode():
        got = [digests(run(_ops, case)) for case in made]
    assert got == expected


def test_subnormal_deltas_are_kept() -> None:
    """What the test above compares is there at all."""
    tiny = torch.full((40,), 2.0**-140)
    with flushed_denormals():
        u, planes, _ = _ops.unify([tiny], [], 1, 0, F32, [])
    assert torch.equal(u[:40].view(torch.int32), tiny.view(torch.int32))
    assert planes[0][:5].tolist() == [255] * 5


def test_modes_are_given_back() -> None:
    model = [torch.ones(70000)]
    with flushed_denormals():
        _ops.measure(model, [], [])
        assert float(torch.tensor(1e-40) * 1.0) == 0.0
    _ops.measure(model, [], [])
    assert float(torch.tensor(1e-40) * 1.0) > 0.0


def test_default_is_the_widest_instruction_set() -> None:
    if "CONDU_CPU_ISA" in os.environ:
        pytest.skip("CONDU_CPU_ISA is set")
    capability = torch.backends.cpu.get_cpu_capability()
    expected = {"AVX512": "avx512", "AVX2": "avx2"}.get(capability)
    if expected is None:
        pytest.skip(f"torch reports {capability}")
    assert build_info()["cpu_isa"] == expected
