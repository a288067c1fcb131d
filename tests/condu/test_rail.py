from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny_run import tiny_trainer
from torch import Tensor

from condu.config import ConfigError
from condu.features import zero_shot_head
from condu.methods import rail_dual, rail_primal
from condu.methods.rail import Rail, answer
from condu.methods.rail_dual import KernelRidge
from condu.methods.rail_primal import RecursiveRidge

CPU = torch.device("cpu")
SIZES = (3, 5, 4)  # classes of each task


@pytest.fixture
def tasks() -> list[tuple[Tensor, Tensor]]:
    """Normalised features [M, 6] and labels through all tasks; some images twice."""
    torch.manual_seed(0)
    found, first = [], 0
    for classes in SIZES:
        features = torch.nn.functional.normalize(torch.randn(40, 6), dim=1)
        features[-3:] = features[:3]
        found.append((features, torch.randint(first, first + classes, (40,))))
        first += classes
    return found


def joined(tasks: list[tuple[Tensor, Tensor]]) -> tuple[np.ndarray, np.ndarray]:
    """All features, and one-hot labels."""
    features = torch.cat([features for features, _ in tasks]).double().numpy()
    labels = torch.cat([labels for _, labels in tasks]).numpy()
    return features, np.eye(sum(SIZES[: len(tasks)]))[labels]


def test_recursive_ridge_equals_the_joint_solution_after_every_task(
    tasks: list[tuple[Tensor, Tensor]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rail_primal, "BATCH", 7)  # does not divide 40
    ridge = RecursiveRidge(50, 0.1, seed=3, device=CPU)
    images = torch.randn(20, 6)
    for count, (features, labels) in enumerate(tasks, start=1):
        ridge.absorb(features, labels, sum(SIZES[:count]))
        x, y = joined(tasks[:count])
        assert ridge._random is not None
        phi = np.maximum(x @ ridge._random.numpy(), 0)
        joint = np.linalg.solve(phi.T @ phi + 0.1 * np.eye(50), phi.T @ y)
        np.testing.assert_allclose(ridge.weights.numpy(), joint, rtol=0, atol=1e-10)
        expected = np.maximum(images.double().numpy() @ ridge._random.numpy(), 0) @ joint
        np.testing.assert_allclose(ridge.scores(images).numpy(), expected, rtol=0, atol=1e-9)


def test_random_weights_are_those_of_the_seed_and_no_larger_than_the_papers() -> None:
    features, labels = torch.rand(4, 16), torch.arange(4)
    one, same, other = (RecursiveRidge(500, 0.1, seed=s, device=CPU) for s in (1, 1, 2))
    for ridge in (one, same, other):
        ridge.absorb(features, labels, 4)
    assert torch.equal(one.scores(features), same.scores(features))
    assert not torch.equal(one.scores(features), other.scores(features))
    assert one._random is not None
    assert 0.24 < float(one._random.abs().max()) <= 0.25
    assert abs(float(one._random.mean())) < 0.01


def test_kernel_ridge_equals_the_joint_solution_after_every_task(
    tasks: list[tuple[Tensor, Tensor]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rail_dual, "BATCH", 7)
    kernel = KernelRidge(0.1, 1e-3, device=CPU)
    images = torch.randn(20, 6)
    for count, (features, labels) in enumerate(tasks, start=1):
        kernel.absorb(features, labels)
        x, y = joined(tasks[:count])

        def gaussian(a: np.ndarray, b: np.ndarray) -> np.ndarray:
            return np.exp(-0.1 * ((a[:, None] - b[None]) ** 2).sum(-1))

        alpha = np.linalg.solve(gaussian(x, x) + 1e-3 * np.eye(len(x)), y)
        expected = gaussian(images.double().numpy(), x) @ alpha
        scores = kernel.scores(images, y.shape[1]).numpy()
        np.testing.assert_allclose(scores, expected, rtol=0, atol=1e-9)


def test_the_adapter_has_a_say_where_zero_shot_recognises_a_seen_class() -> None:
    logits = torch.tensor([[2.0, 0.0, 1.0], [0.0, 0.0, 5.0]]).log_softmax(1)
    adapter = torch.tensor([[-0.5, 1.5], [9.0, 9.0]])
    p = logits.double().exp()
    expected = p.clone()
    expected[0] = 0.2 * p[0] + 0.8 * torch.tensor([-0.5, 1.5, 0.0])
    torch.testing.assert_close(answer(logits, adapter, 0.8), expected)
    torch.testing.assert_close(answer(logits, adapter[:, :0], 0.8), p)


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    trainer = tiny_trainer(
        tmp_path_factory.mktemp("runs") / "run", methods=["zero_shot", "rail_primal", "rail_dual"]
    )
    methods: dict[str, Any] = trainer.run()["methods"]
    return methods


def matrix_of(methods: dict[str, Any], method: str, protocol: str = "task-id") -> Any:
    return methods[method]["protocols"][protocol]["matrix"]


@pytest.mark.parametrize("method", ["rail_primal", "rail_dual"])
def test_unseen_tasks_are_answered_zero_shot_and_seen_ones_are_not_forgotten(
    results: dict[str, Any], method: str
) -> None:
    rows, zero_shot = (matrix_of(results, name) for name in (method, "zero_shot"))
    assert rows[0][1] == zero_shot[0][1]
    assert rows[0][0] > zero_shot[0][0] + 30
    assert rows[1][0] > rows[0][0] - 5
    assert rows[1][1] > rows[0][1] + 30


@pytest.mark.parametrize("method", ["rail_primal", "rail_dual"])
def test_without_the_adapter_it_is_zero_shot(tmp_path: Path, method: str) -> None:
    changes: dict[str, Any] = {"rail": {"weight": 0.0, "hidden": 8}}
    methods = tiny_trainer(tmp_path / "run", methods=["zero_shot", method], **changes).run()[
        "methods"
    ]
    for protocol in ("task-id", "agnostic"):
        assert matrix_of(methods, method, protocol) == matrix_of(methods, "zero_shot", protocol)


def expected_percent(rail: Rail, index: int, protocol: str, position: int) -> float:
    """RAIL's fusion image by image: who may answer what, counted through all tasks."""
    tasks = list(rail.workspace.benchmark)
    numbers = [(t.name, c) for t in tasks for c in range(len(t.classnames))]
    seen = [t.name for t in tasks[: index + 1]]
    task = tasks[position]
    if protocol == "union-x-tail":
        allowed = [t.name for t in tasks]
    else:
        allowed = seen if protocol == "union-odcl-cil" and task.name in seen else [task.name]
    model, tokenize = rail.clip.model, rail.clip.tokenize
    heads = torch.cat([zero_shot_head(model, tokenize, t) for t in tasks]).double().numpy()
    frozen = rail.evaluator.frozen_answers(task)
    adapter, right = rail.adapter(frozen.features).numpy(), 0
    for feature, adapted, label in zip(frozen.features, adapter, frozen.labels, strict=True):
        powers = np.exp(float(model.logit_scale.detach().exp()) * heads @ feature.double().numpy())
        answers = [n for n, (name, _) in enumerate(numbers) if name in allowed]
        # who else there is decides whether the adapter has a say, unless the protocol names them
        known = answers if protocol == "union-odcl-cil" else range(len(numbers))
        scores = list(powers / sum(powers[n] for n in known))
        if max(known, key=lambda n: scores[n]) < len(adapted):
            scores = [0.2 * p for p in scores]
            for number, value in enumerate(adapted):
                scores[number] += 0.8 * value
        best = max(answers, key=lambda number: scores[number])
        right += numbers[best] == (task.name, int(label))
    return 100 * right / len(frozen.labels)


@pytest.mark.parametrize("method", ["rail_primal", "rail_dual"])
def test_unions_are_answered_image_by_image_as_in_rail(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    protocols: tuple[Any, ...] = ("agnostic", "union-odcl-cil", "union-x-tail")
    compared: list[Any] = []
    rows = Rail.rows

    def watched(self: Rail, index: int, asked: Any) -> Any:
        found = rows(self, index, asked)
        for protocol, row in found.items():
            expected = [expected_percent(self, index, protocol, j) for j in range(2)]
            assert row.accuracy == pytest.approx(expected), (protocol, index)
            compared.append((index, protocol, row.accuracy))
        return found

    monkeypatch.setattr(Rail, "rows", watched)
    tiny_trainer(tmp_path / "run", methods=[method], protocols=protocols).run()
    assert len(compared) == 2 * len(protocols)
    assert len({str(accuracy) for _, _, accuracy in compared}) >= 4


def test_a_kernel_that_does_not_fit_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    free = 8 * (2 * 96**2 + 48**2 + 48**2)  # at the second task
    monkeypatch.setattr(rail_dual, "available_memory", lambda device: free - 1)
    trainer = tiny_trainer(tmp_path / "run", methods=["rail_dual"])
    with pytest.raises(ConfigError, match=r"'rail_dual' needs .* of 96 training images"):
        trainer.run()
    assert not (tmp_path / "run").exists()
    monkeypatch.setattr(rail_dual, "available_memory", lambda device: free)
    trainer.run()
