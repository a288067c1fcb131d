"""Digests of everything that the CPU kernels compute, printed as JSON.

Run as a script in a process with ``CONDU_CPU_ISA`` set; every instruction set must print the same.
Also reads inputs that end where the next page may not be touched, which only a separate process
should try.
"""

from __future__ import annotations

import ctypes
import json
import mmap

import torch
from kernel_cases import BF16, F16, F32, Case, digests, make_case, run
from range_operators import InRanges
from torch import Tensor

import condu_ext
from condu_ext import _ops


def cases() -> dict[str, Case]:
    """Few cases that reach every kernel of an instruction set: dtypes, states, tails, chunks."""
    sizes = (1, 7, 16, 33, 0, 64, 257, 1025)
    found = {
        "fp32": make_case(sizes, 3, "fp32"),
        "bf16": make_case(sizes, 9, "bf16", BF16, 1),
        "fp16": make_case(sizes, 6, "fp16", F32, 2),
        "fp16, bf16 state": make_case(sizes, 2, "fp16", BF16),
        "fp32, bf16 state": make_case(sizes, 4, "fp32", BF16, 2),
        "bf16, fp32 state": make_case(sizes, 4, "bf16", F32, 1),
        "mixed": make_case((65537, 131073, 5), 5, "mixed"),
        "mixed, bf16 state": make_case(sizes, 17, "mixed", BF16, 1),
    }
    for kind, code, narrow in (("fp32", 1, BF16), ("fp32", 2, F16), ("bf16", 2, F16)):
        case = make_case((33, 1025), 2, kind)
        case.models = [[t.to(narrow) for t in model] for model in case.models]
        case.via = [code, code]
        found[f"{kind} through {narrow}"] = case
    return found


def all_patterns(dtype: torch.dtype) -> Tensor:
    """Every value of a 16-bit type, in the order of its bits."""
    return torch.arange(65536, dtype=torch.int32).to(torch.int16).view(dtype)


def through_kernels(base: Tensor, out_dtype: torch.dtype) -> Tensor:
    """A tensor read, and written in another dtype, by decouple_ with an empty mask."""
    out = torch.empty(base.shape, dtype=out_dtype)
    size = (base.numel() + 511) // 512 * 512
    plane = torch.zeros(size // 8, dtype=torch.uint8)
    _ops.decouple_([out], torch.zeros(size), plane, torch.ones(1), [base], [])
    return out


def awkward_floats() -> Tensor:
    """fp32 values around every rounding step of the 16-bit types: ties, subnormals, overflow."""
    finite = torch.cat([all_patterns(dtype).float() for dtype in (BF16, F16)])
    finite = finite[finite.isfinite()]
    bits = finite.view(torch.int32)
    half_steps = [0x8000, 0x1000]  # half of a bf16 step, half of an fp16 step of a normal number
    near = [(bits + h + e).view(F32) for h in half_steps for e in (-1, 0, 1)]
    middles = [(finite.double() + e * 2.0**-25).float() for e in (-1.0, 1.0)]  # fp16 subnormals
    random = torch.randint(-(2**31), 2**31, (1 << 17,), generator=torch.Generator().manual_seed(0))
    values = torch.cat([finite, *near, *middles, random.to(torch.int32).view(F32)])
    return values[~values.isnan()]


def conversions() -> dict[str, Tensor]:
    results = {f"awkward to {d}": through_kernels(awkward_floats(), d) for d in (F32, BF16, F16)}
    for source in (BF16, F16):
        patterns = all_patterns(source)
        patterns = patterns[~patterns.isnan()]
        for target in (F32, BF16, F16):
            results[f"{source} to {target}"] = through_kernels(patterns, target)
    return results


def at_the_end_of_a_page(numel: int, dtype: torch.dtype) -> Tensor:
    """A tensor whose last byte is the last before a page that must not be read or written."""
    page = mmap.PAGESIZE
    size = numel * dtype.itemsize
    pages = (size + page - 1) // page
    buffer = mmap.mmap(-1, (pages + 1) * page)
    address = ctypes.addressof(ctypes.c_char.from_buffer(buffer))
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.mprotect(ctypes.c_void_p(address + pages * page), page, 0):
        raise OSError(ctypes.get_errno(), "mprotect")
    flat = torch.frombuffer(buffer, dtype=torch.uint8, count=pages * page)
    return flat[pages * page - size :].view(dtype)


def touch_page_ends() -> None:
    """Inputs and decoupled outputs of many sizes against forbidden memory."""

    def place(tensor: Tensor) -> Tensor:
        if not tensor.numel():
            return tensor
        placed = at_the_end_of_a_page(tensor.numel(), tensor.dtype)
        placed.copy_(tensor)
        return placed

    for kind in ("fp32", "bf16", "mixed"):
        case = make_case((1, 7, 15, 17, 63, 65, 513), 2, kind, place=place)
        run(_ops, case)
        arena = 6 * 512 + 1024
        outs = [place(t.clone()) for t in case.base]
        plane = torch.zeros(arena // 8, dtype=torch.uint8)
        _ops.decouple_(outs, torch.zeros(arena), plane, case.rescalers[0], case.base, [])


def probe() -> dict[str, dict[str, str]]:
    """Digests by case and result."""
    found = {name: digests(run(_ops, case)) for name, case in cases().items()}
    found["in ranges"] = digests(run(InRanges(seed=0), cases()["mixed"]))
    return found | {"conversions": digests(conversions())}


if __name__ == "__main__":
    torch.set_num_threads(1)
    touch_page_ends()
    print(json.dumps({"isa": condu_ext.build_info()["cpu_isa"], "digests": probe()}))
