"""What `condu.theory` measures, against the formulas in float64 on rebuilt deltas."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from condu.theory.deltas import FineTunedDeltas, RandomDeltas, SampledDeltas
from condu.theory.joining import Joining, decay, join
from condu.theory.repetition import RESOLUTION, repeat, swapped

TASKS, ELEMENTS = 6, 3000


@dataclass(frozen=True)
class Given:
    vectors: Sequence[Tensor]

    @property
    def names(self) -> Sequence[str]:
        return [f"task {index}" for index in range(len(self.vectors))]

    def __getitem__(self, index: int) -> Tensor:
        return self.vectors[index].clone()


def given(*rows: Sequence[float]) -> Given:
    return Given([torch.tensor(row, dtype=torch.float32) for row in rows])


def heavy_tailed() -> Given:
    """Deltas of unequal sizes and tails; the first two leave elements alone that others move."""
    random = np.random.default_rng(3)
    vectors = random.standard_normal((TASKS, ELEMENTS)) ** 3 + 0.1
    vectors *= 1e-3 * np.arange(1, TASKS + 1)[:, None]
    vectors[:2, :500] = 0
    return Given(list(torch.from_numpy(vectors.astype(np.float32))))


@dataclass(frozen=True)
class Unified:
    """Unify as the paper defines it, of float64 [T, N]."""

    deltas: np.ndarray

    @property
    def sign(self) -> np.ndarray:
        return np.where(self.deltas.sum(axis=0) > 0, 1.0, -1.0)

    @property
    def masks(self) -> np.ndarray:
        return self.deltas * self.sign > 0

    @property
    def candidates(self) -> np.ndarray:
        return np.where(self.masks, np.abs(self.deltas), 0)

    @property
    def winner(self) -> np.ndarray:
        """-1 where nobody has moved anything."""
        found = self.candidates.argmax(axis=0)
        return np.where(self.candidates.max(axis=0) > 0, found, -1)

    @property
    def rescalers(self) -> np.ndarray:
        elected = (self.masks * self.candidates.max(axis=0)).sum(axis=1)
        return np.abs(self.deltas).sum(axis=1) / elected

    @property
    def decoupled(self) -> np.ndarray:
        unified = self.sign * self.candidates.max(axis=0)
        return self.rescalers[:, None] * self.masks * unified


def as_float64(deltas: Given) -> np.ndarray:
    return np.stack([vector.double().numpy() for vector in deltas.vectors])


def ignore(count: int) -> None:
    pass


def test_repeating_is_decoupling_and_unifying_again() -> None:
    deltas = heavy_tailed()
    found = repeat(deltas, 4, 12, ignore)
    current, changes, rescalers = as_float64(deltas)[:4], [], []
    first = Unified(current)
    for _ in range(12):
        unified = Unified(current)
        changes.append(np.abs(unified.decoupled - current).sum() / np.abs(current).sum())
        rescalers.append(unified.rescalers)
        current = unified.decoupled
    np.testing.assert_allclose(found.changes, changes, rtol=1e-3, atol=RESOLUTION)
    np.testing.assert_allclose(found.rescalers_first, rescalers[0], rtol=1e-6)
    np.testing.assert_allclose(found.rescalers_last, rescalers[-1], rtol=1e-6)
    overlaps = [(a & b).sum() / min(a.sum(), b.sum()) for a, b in combinations(first.masks, 2)]
    assert found.least_overlap == pytest.approx(min(overlaps))
    assert (found.tasks, found.pairs, found.meeting, found.mask_flips) == (4, 6, 6, 0)
    assert found.all_meet
    assert not found.converged


def test_repeating_stops_when_float32_can_tell_no_change() -> None:
    calls: list[int] = []
    found = repeat(RandomDeltas(2, torch.ones(ELEMENTS), seed=1), 2, 1000, calls.append)
    assert found.converged
    assert all(change > RESOLUTION for change in found.changes[:-1])
    assert found.changes[-1] <= RESOLUTION
    assert calls == [1] * len(found.changes)
    assert 2 < len(found.changes) < 1000


def test_deltas_that_agree_need_no_iteration() -> None:
    found = repeat(given([1, 2, 0], [1, 2, 0]), 2, 9, ignore)
    assert found.changes == [0]
    assert (found.rescalers_first, found.least_overlap) == ([1, 1], 1)


def test_masks_that_never_meet_are_reported() -> None:
    found = repeat(given([1, 2, 0, 0], [0, 0, 3, 0], [0, 1, 0, 4]), 3, 5, ignore)
    assert (found.pairs, found.meeting) == (3, 1)
    assert not found.all_meet
    assert found.least_overlap == 0


def test_mask_bits_that_repeating_loses_are_counted() -> None:
    smallest = 1e-45  # times λ = 1/3 it rounds to zero, and a zero is in no mask
    found = repeat(given([smallest, 1, 0.5], [0, 4, 0.25]), 2, 3, ignore)
    assert found.mask_flips == 1


def test_rescalers_that_change_their_order_are_reported() -> None:
    # b, within a's mask, keeps λ = .5. c begins with less, for x is greater in its only element;
    # but then x shrinks, being outdone by y elsewhere, and c wins there: λ = 1.
    a, b, c, x, y = [2, 0, 0], [1, 0, 0], [0, 1, 0], [0, 10, 1], [0, 0, 1000]
    found = repeat(given(a, b, c, x, y), 5, 20, ignore)
    assert found.swaps == {2: 1}
    assert not found.order_stays
    assert found.rescalers_first[1] == 0.5 > found.rescalers_first[2] == pytest.approx(0.1)
    assert found.rescalers_last[2] == pytest.approx(1)
    assert repeat(given(a, b, y), 3, 20, ignore).order_stays


def test_an_order_within_rounding_is_none() -> None:
    near, far = np.array([1.0 - RESOLUTION / 2, 1.0]), np.array([0.5, 0.4])
    assert swapped(far, near) == swapped(near, far) == 0
    assert swapped(np.array([0.5, 0.4, 0.3]), np.array([0.3, 0.4, 0.5])) == 3


def test_what_a_new_task_does_to_old_ones() -> None:
    deltas = heavy_tailed()
    found = join(deltas, TASKS, ignore)
    vectors = as_float64(deltas)
    before = Unified(vectors[:1])
    for n, row in enumerate(found, start=2):
        old = before.decoupled
        after = Unified(np.concatenate([old, vectors[n - 1 : n]]))
        moved = before.winner >= 0
        flips = before.masks != after.masks[:-1]
        expected = Joining(
            tasks=n,
            elements=int(moved.sum()),
            mask_flips=flips[:, moved].mean(),
            mask_losses=flips.sum() / before.masks.sum(),
            sign_flips=(before.sign != after.sign)[moved].mean(),
            winner_changes=(before.winner != after.winner)[moved].mean(),
            won_by_new=(after.winner == n - 1)[moved].mean(),
            delta_change=(
                np.abs(after.decoupled[:-1] - old).sum(axis=1) / np.abs(old).sum(axis=1)
            ).mean(),
        )
        for field, value in expected.__dict__.items():
            assert getattr(row, field) == pytest.approx(value, rel=1e-5), (n, field)
        before = after
    assert [row.elements for row in found] == [ELEMENTS - 500] * 2 + [ELEMENTS] * 3
    assert all(0 < row.mask_flips <= row.mask_losses < 1 for row in found)


def test_a_task_that_did_not_move_changes_nothing() -> None:
    (row,) = join(given([1, -2, 0, 4], [0, 0, 0, 0]), 2, ignore)
    assert row == Joining(2, 3, 0, 0, 0, 0, 0, 0)


def test_decay_is_the_power_of_n() -> None:
    row = join(given([1, 2], [2, 1]), 2, ignore)[0]
    rows = [replace(row, tasks=n, delta_change=3 / n**2) for n in range(2, 21)]
    rows[0] = replace(rows[0], delta_change=9.0)  # only the second half counts
    assert decay(rows) == pytest.approx(-2)
    assert decay(rows[:-1]) is None  # of 19 tasks
    assert decay([replace(row, delta_change=0.0) for row in rows]) is None


def test_bad_numbers_and_deltas_are_refused() -> None:
    deltas = given([1, 2], [1, float("nan")])
    with pytest.raises(ValueError, match=r"tasks: must be from 2 to the 2 deltas, got 3"):
        repeat(deltas, 3, 5, ignore)
    with pytest.raises(ValueError, match=r"tasks: must be from 2 to the 2 deltas, got 1"):
        join(deltas, 1, ignore)
    with pytest.raises(ValueError, match=r"iterations: must be at least 1, got 0"):
        repeat(deltas, 2, 0, ignore)
    for measure in (lambda: repeat(deltas, 2, 5, ignore), lambda: join(deltas, 2, ignore)):
        with pytest.raises(ValueError, match="'task 1'"):
            measure()


def test_fine_tuned_deltas_are_read_from_files(tmp_path: Path) -> None:
    pretrained = {"a": torch.tensor([[1.0, 2.0]]), "b": torch.tensor([0.5])}
    files = [tmp_path / f"{index}.safetensors" for index in range(2)]
    save_file({"b": torch.tensor([0.25]), "a": torch.tensor([[4.0, 2.0]])}, files[0])
    save_file({"b": torch.tensor([0.5]), "a": torch.tensor([[1.0, 3.0]])}, files[1])
    deltas = FineTunedDeltas(["x", "y"], files, pretrained)
    assert [deltas[index].tolist() for index in range(2)] == [[3, 0, -0.25], [0, 1, 0]]
    rms = [np.sqrt((9 + 1) / 4)] * 2 + [np.sqrt(0.25**2 / 2)]
    np.testing.assert_allclose(deltas.scale(), rms, rtol=1e-6)
    save_file({"a": torch.tensor([[4.0, 2.0]])}, files[0])
    with pytest.raises(ValueError, match=r"0\.safetensors: there is no tensor 'b'"):
        deltas[0]
    save_file({"a": torch.zeros(3), "b": torch.zeros(1)}, files[0])
    with pytest.raises(ValueError, match=r"'a': the shape is \[3\], .* \[1, 2\]"):
        deltas[0]


def test_random_deltas_have_the_scale_and_come_again() -> None:
    scale = torch.repeat_interleave(torch.tensor([0.0, 2.0]), torch.tensor([10, 50_000]))
    deltas = RandomDeltas(3, scale, seed=4)
    assert not deltas[1][:10].any()
    assert deltas[1][10:].std() == pytest.approx(2, rel=0.02)
    assert torch.equal(deltas[1], RandomDeltas(9, scale, seed=4)[1])
    assert not torch.equal(deltas[1], deltas[2])
    assert not torch.equal(deltas[1], RandomDeltas(3, scale, seed=5)[1])


def test_a_sample_takes_the_same_elements_of_every_delta() -> None:
    whole = Given([torch.arange(100.0), torch.arange(100.0) * 2])
    sample = SampledDeltas.draw(whole, 100, 10, seed=0)
    assert len(sample[0].unique()) == 10
    assert torch.equal(sample[1], sample[0] * 2)
    assert torch.equal(SampledDeltas.draw(whole, 100, 1000, seed=0)[0], whole[0])
