"""bfloat16 and float16, exhaustively: what the kernels read and write against torch's conversion.

Every instruction set gives what is checked here: test_instruction_sets.py compares the same values.
"""

from __future__ import annotations

import pytest
import torch
from isa_probe import all_patterns, awkward_floats, through_kernels
from kernel_cases import BF16, F16, F32, differing, same_bytes
from torch import Tensor

from condu_ext import _ops

HALVES = [BF16, F16]


def bits(tensor: Tensor) -> Tensor:
    return tensor.view(torch.int16 if tensor.element_size() == 2 else torch.int32)


@pytest.mark.parametrize("dtype", HALVES)
def test_weights_without_a_mask_bit_are_copied(dtype: torch.dtype) -> None:
    """All patterns but signalling NaNs, which no float conversion returns unchanged."""
    patterns = all_patterns(dtype)
    quiet = {BF16: 0x0040, F16: 0x0200}[dtype]
    kept = ~patterns.isnan() | ((bits(patterns) & quiet) != 0)
    assert int(kept.sum()) == 65536 - 2 * (quiet - 1)
    patterns = patterns[kept]
    out = through_kernels(patterns, dtype)
    assert same_bytes(out, patterns), differing(out, patterns)


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("target", [F32, BF16, F16])
def test_reading_every_pattern(dtype: torch.dtype, target: torch.dtype) -> None:
    patterns = all_patterns(dtype)
    patterns = patterns[~patterns.isnan()]
    out = through_kernels(patterns, target)
    assert same_bytes(out, patterns.to(target)), differing(out, patterns.to(target))


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("operation", ["unify", "absorb"])
def test_every_pattern_as_a_delta(dtype: torch.dtype, operation: str) -> None:
    patterns = all_patterns(dtype)
    patterns = patterns[patterns.isfinite()]
    size = (len(patterns) + 511) // 512 * 512
    if operation == "unify":
        u, planes, sums = _ops.unify([patterns], [], 1, 0, F32, [])
        num = sums[0]
    else:
        empty = (torch.zeros(size), [], torch.zeros(0, 1))
        u, planes, sums = _ops.absorb(*empty, [patterns], [], 0, [])
        num = sums[1]
    exact = patterns.float() + 0.0  # -0.0 counts as zero
    assert same_bytes(u[: len(patterns)], exact), differing(u[: len(patterns)], exact)
    mask = torch.zeros(size, dtype=torch.bool)
    mask[: len(patterns)] = exact != 0
    weights = torch.tensor([1, 2, 4, 8, 16, 32, 64, 128])
    packed = (mask.view(-1, 8) * weights).sum(1).to(torch.uint8)
    assert torch.equal(planes[0], packed)
    if dtype == F16:  # bfloat16's largest values overflow the fp32 sums of a block
        assert float(num.sum()) == pytest.approx(float(exact.double().abs().sum()), rel=1e-7)


@pytest.mark.parametrize("dtype", HALVES)
def test_rounding_of_written_weights(dtype: torch.dtype) -> None:
    """To nearest, ties to even, subnormals kept, infinity beyond the range."""
    values = awkward_floats()
    out = through_kernels(values, dtype)
    assert same_bytes(out, values.to(dtype)), differing(out, values.to(dtype))


def test_the_awkward_values_are_awkward() -> None:
    """Ties of both parities, both signs, and results that are subnormal or infinite."""
    values = awkward_floats()
    for dtype, step in ((BF16, 0x8000), (F16, 0x1000)):
        ties = values[(bits(values) & (2 * step - 1)) == step]
        down = ties.to(dtype).float().abs() < ties.abs()
        assert down.any()
        assert (~down).any()
        rounded = values.to(dtype)
        assert rounded.isinf().any()
        assert ((rounded != 0) & (rounded.abs() < torch.finfo(dtype).tiny)).any()


def test_rounding_of_a_bfloat16_state() -> None:
    """u is rounded once when stored; its sum is that of the stored values."""
    values = awkward_floats()
    values = values[values.abs() < 1e30]
    u, _, sums = _ops.unify([values], [], 1, 0, BF16, [])
    expected = (values + 0.0).to(BF16)
    assert same_bytes(u[: len(values)], expected), differing(u[: len(values)], expected)
    stored = float(expected.double().abs().sum())
    assert float(sums[1].sum()) == pytest.approx(stored, rel=1e-7)
    assert float(sums[0].sum()) == pytest.approx(float(values.double().abs().sum()), rel=1e-7)


@pytest.mark.parametrize(("source", "code"), [(F32, 1), (F32, 2), (BF16, 2), (F16, 1)])
def test_rounding_of_the_base(source: torch.dtype, code: int) -> None:
    """Codes 1 and 2: through bfloat16 and float16."""
    values = awkward_floats() if source == F32 else all_patterns(source)
    narrow = (None, BF16, F16)[code]
    values = values[values.to(narrow).isfinite()]
    out = torch.empty(values.shape)
    size = (len(values) + 511) // 512 * 512
    plane = torch.zeros(size // 8, dtype=torch.uint8)
    _ops.decouple_([out], torch.zeros(size), plane, torch.ones(1), [values], [code])
    expected = values.to(narrow).float()
    assert same_bytes(out, expected), differing(out, expected)
