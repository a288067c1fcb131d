from __future__ import annotations

from dataclasses import FrozenInstanceError
from typing import Any

import pytest
import torch
from torch import Tensor

from condu.prototypes import PrototypeSet
from condu.voting import PRETRAINED, SemanticVoting

E = torch.eye(4)


def prototypes_of(**tasks: Tensor) -> PrototypeSet:
    """A set whose prototypes are the given directions, one class a row."""
    prototypes = PrototypeSet()
    for name, directions in tasks.items():
        prototypes.add(name, directions, torch.arange(len(directions)), directions)
    return prototypes


@pytest.fixture
def three() -> PrototypeSet:
    return prototypes_of(a=E[:2], b=E[2:3], c=E[3:4])


def test_a_task_counts_by_its_best_prototype(three: PrototypeSet) -> None:
    # mean over a's prototypes would be .4 and lose against b
    features = torch.tensor([[0.0, 0.8, 0.6, 0.0]])
    votes = SemanticVoting(k=1).vote(features, three)
    assert votes.experts.tolist() == [[0]]
    assert votes.weights.tolist() == [[1.0]]
    assert votes.experts.dtype == torch.int64
    assert votes.weights.dtype == torch.float32


def test_similarity_weights_are_proportional_to_the_cosine(three: PrototypeSet) -> None:
    features = 7 * torch.tensor([[0.6, 0.0, 0.8, 0.0], [0.0, 0.0, 0.6, 0.8]])
    votes = SemanticVoting(k=2).vote(features, three)
    assert votes.experts.tolist() == [[1, 0], [2, 1]]
    expected = torch.tensor([[0.8, 0.6], [0.8, 0.6]]) / 1.4
    torch.testing.assert_close(votes.weights, expected)


def test_k_beyond_the_number_of_tasks_takes_all_of_them(three: PrototypeSet) -> None:
    votes = SemanticVoting(k=9).vote(torch.tensor([[0.1, 0.0, 0.2, 0.3]]), three)
    assert votes.experts.tolist() == [[2, 1, 0]]


@pytest.mark.parametrize("tasks", [3, 40])
def test_ties_go_to_the_earlier_task(tasks: int) -> None:
    # the first task is far away, all others are equally near
    same = {f"t{i}": E[:1] for i in range(1, tasks)}
    votes = SemanticVoting(k=2).vote(E[:1].repeat(5, 1), prototypes_of(t0=E[1:2], **same))
    assert votes.experts.tolist() == [[1, 2]] * 5


def test_negative_similarities(three: PrototypeSet) -> None:
    features = torch.tensor([[-0.9, -0.8, 0.5, -0.1], [-1.0, -1.0, -2.0, -3.0]])
    votes = SemanticVoting(k=2).vote(features, three)
    # first: only b is positive and takes all; second: none is, so all are equal
    assert votes.experts.tolist() == [[1, 2], [0, 1]]
    torch.testing.assert_close(votes.weights, torch.tensor([[1.0, 0.0], [0.5, 0.5]]))


@pytest.mark.parametrize("weights", ["similarity", "uniform", "softmax"])
@pytest.mark.parametrize("include_pretrained", [False, True])
def test_weights_sum_to_one_and_are_not_negative(
    weights: Any, include_pretrained: bool, three: PrototypeSet
) -> None:
    torch.manual_seed(0)
    features = torch.cat([torch.randn(50, 4), torch.zeros(1, 4)])
    voting = SemanticVoting(k=2, weights=weights, include_pretrained=include_pretrained)
    votes = voting.vote(features, three)
    assert votes.experts.shape == votes.weights.shape == (51, 2 + include_pretrained)
    torch.testing.assert_close(votes.weights.sum(dim=1), torch.ones(51))
    assert bool((votes.weights >= 0).all())


def test_softmax_weights_and_temperature(three: PrototypeSet) -> None:
    features = torch.tensor([[0.6, 0.0, 0.8, 0.0]])
    votes = SemanticVoting(k=2, weights="softmax", temperature=0.1).vote(features, three)
    torch.testing.assert_close(votes.weights, torch.tensor([[0.8, 0.6]]).div(0.1).softmax(1))


def test_pretrained_comes_first_with_an_equal_share(three: PrototypeSet) -> None:
    features = torch.tensor([[0.6, 0.0, 0.8, 0.0]])
    votes = SemanticVoting(k=2, include_pretrained=True).vote(features, three)
    assert votes.experts.tolist() == [[PRETRAINED, 1, 0]]
    expected = torch.tensor([[1 / 3, 2 / 3 * 0.8 / 1.4, 2 / 3 * 0.6 / 1.4]])
    torch.testing.assert_close(votes.weights, expected)


def test_the_first_choice_is_a_task_whoever_else_votes(three: PrototypeSet) -> None:
    features = torch.tensor([[0.6, 0.0, 0.8, 0.0], [0.0, 0.0, 0.6, 0.8], [1.0, 0.0, 1.0, 1.0]])
    for k in (1, 2, 9):
        for include_pretrained in (False, True):
            voting = SemanticVoting(k=k, include_pretrained=include_pretrained)
            assert voting.vote(features, three).first_choices.tolist() == [1, 2, 0]


def test_code_preset_is_uniform_over_pretrained_and_top_four() -> None:
    tasks = {f"t{i}": torch.eye(8)[i : i + 1] for i in range(6)}
    voting = SemanticVoting.preset("code")
    votes = voting.vote(
        torch.tensor([[1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 0.0, 0.0]]), prototypes_of(**tasks)
    )
    assert votes.experts.tolist() == [[-1, 5, 4, 3, 2]]
    torch.testing.assert_close(votes.weights, torch.full((1, 5), 0.2))
    assert voting.space == "logits"


def test_paper_preset_is_the_default() -> None:
    assert SemanticVoting.preset("paper") == SemanticVoting()
    assert SemanticVoting() == SemanticVoting(
        k=4, weights="similarity", include_pretrained=False, space="probabilities"
    )


def test_fuse_probabilities_and_logits_differ_as_they_should() -> None:
    # one loud expert wins among logits, two quiet ones among probabilities
    logits = torch.tensor([[[100.0, 0.0], [0.0, 10.0], [0.0, 10.0]]])
    weights = torch.full((1, 3), 1 / 3)
    by_logits = SemanticVoting(space="logits").fuse(logits, weights)
    torch.testing.assert_close(by_logits, torch.tensor([[100 / 3, 20 / 3]]))
    by_probability = SemanticVoting(space="probabilities").fuse(logits, weights)
    torch.testing.assert_close(by_probability, logits.softmax(dim=-1).mean(dim=1))
    assert by_logits.argmax() == 0
    assert by_probability.argmax() == 1


def test_fuse_uses_each_images_own_weights() -> None:
    logits = torch.tensor([[[1.0, 0.0], [0.0, 1.0]]]).repeat(2, 1, 1)
    fused = SemanticVoting(space="logits").fuse(logits, torch.tensor([[0.9, 0.1], [0.25, 0.75]]))
    torch.testing.assert_close(fused, torch.tensor([[0.9, 0.1], [0.25, 0.75]]))
    with pytest.raises(ValueError, match=r"\[2, 2, 2\] and \[2, 3\]"):
        SemanticVoting().fuse(logits, torch.ones(2, 3))


def test_bad_features(three: PrototypeSet) -> None:
    voting = SemanticVoting()
    with pytest.raises(ValueError, match=r"\[B, 4\].*\[2, 3\]"):
        voting.vote(torch.ones(2, 3), three)
    for value in (torch.nan, torch.inf):
        features = torch.ones(3, 4)
        features[1, 2] = value
        with pytest.raises(ValueError, match="image 1 are not finite"):
            voting.vote(features, three)
    with pytest.raises(ValueError, match="empty"):
        voting.vote(torch.ones(1, 4), PrototypeSet())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"k": 0}, "k must .* 0"),
        ({"k": 1.5}, r"k must .* 1\.5"),
        ({"k": True}, "k must .* True"),
        ({"weights": "cosine"}, "weights must .* 'cosine'"),
        ({"space": "probability"}, "space must .* 'probability'"),
        ({"temperature": 0.0}, r"temperature must .* 0\.0"),
        ({"temperature": float("nan")}, "temperature must .* nan"),
    ],
)
def test_bad_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SemanticVoting(**options)


def test_unknown_preset_and_frozen() -> None:
    with pytest.raises(ValueError, match="'authors'"):
        SemanticVoting.preset("authors")
    with pytest.raises(FrozenInstanceError):
        SemanticVoting().k = 2  # type: ignore[misc]
