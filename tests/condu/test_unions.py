"""Answers among the classes of several tasks, against plain loops over images in float64."""

from __future__ import annotations

import copy
import math
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from stub_world import Clip, StubClip, World, identity, items, make_world, tokenize
from torch import nn

from condu.evaluation import Evaluator, Protocol, Row
from condu.labels import UNIONS, label_set
from condu.tasks.benchmark import Benchmark, Task
from condu.voting import SemanticVoting

CLASSES = ("ab", "cde", "fg", "hi")
NONE = "the pretrained model"
EVERY: tuple[Protocol, ...] = ("task-id", "agnostic", *UNIONS)

Say = Callable[[str, Any, list[tuple[str, str]]], list[float]]


def unit(vector: list[float]) -> list[float]:
    length = math.sqrt(sum(x * x for x in vector))
    return [x / length for x in vector]


def dot(a: list[float], b: list[float]) -> float:
    return sum(x * y for x, y in zip(a, b, strict=True))


def model_now(world: World) -> Any:
    return copy.deepcopy(world.clip.model.eval()).double()


def models(world: World) -> dict[str, Any]:
    """Every expert and the pretrained model, in float64."""
    world.fusion.reset()
    found = {NONE: model_now(world)}
    for name in world.prototypes.tasks:
        with world.fusion.expert(name):
            found[name] = model_now(world)
    return found


def image_feature(model: Any, image: Any) -> list[float]:
    with torch.no_grad():
        return unit(model.encode_image(image.double()[None])[0].tolist())


def logits(model: Any, image: Any, labels: list[tuple[Task, str]]) -> list[float]:
    """exp(logit_scale)·cosine with each class, which is the mean over all its task's templates."""
    feature, found = image_feature(model, image), []
    for task, name in labels:
        texts = []
        for template in task.templates:
            with torch.no_grad():
                texts.append(unit(model.encode_text(tokenize([template.format(name)]))[0].tolist()))
        mean = [sum(column) / len(texts) for column in zip(*texts, strict=True)]
        found.append(float(model.logit_scale.detach().exp()) * dot(feature, unit(mean)))
    return found


def softmax(values: list[float]) -> list[float]:
    powers = [math.exp(v - max(values)) for v in values]
    return [p / sum(powers) for p in powers]


def classes_of(tasks: list[Task]) -> list[tuple[Task, str]]:
    return [(task, name) for task in tasks for name in task.classnames]


def labels_of(world: World, protocol: str, task: Task) -> list[tuple[Task, str]]:
    tasks, seen = list(world.benchmark), world.prototypes.tasks
    if protocol == "union-x-tail":
        return classes_of(tasks)
    if protocol == "union-odcl-cil" and task.name in seen:
        return classes_of([other for other in tasks if other.name in seen])
    return classes_of([task])


def best_cosines(world: World, pretrained: Any, image: Any) -> dict[str, float]:
    feature = image_feature(pretrained, image)
    return {
        name: max(dot(feature, row) for row in world.prototypes[name].double().tolist())
        for name in world.prototypes.tasks
    }


def first_choice(world: World, pretrained: Any, image: Any) -> str:
    best = best_cosines(world, pretrained, image)
    return max(best, key=lambda name: best[name])


def voters(world: World, pretrained: Any, image: Any, voting: SemanticVoting) -> dict[str, float]:
    """Weight of each expert for one image (presets `paper` and `code`, other K)."""
    best = best_cosines(world, pretrained, image)
    chosen = sorted(best, key=lambda name: -best[name])[: voting.k]
    if voting.weights == "uniform":
        share = 1 / (len(chosen) + voting.include_pretrained)
        pretrained_too = {NONE: share} if voting.include_pretrained else {}
        return pretrained_too | dict.fromkeys(chosen, share)
    positive = {name: max(best[name], 0.0) for name in chosen}
    total = sum(positive.values())
    return {name: p / total if total else 1 / len(chosen) for name, p in positive.items()}


def expected_row(world: World, protocol: str, voting: SemanticVoting) -> tuple[list[float], Any]:
    experts = models(world)
    accuracies, votes = [], []
    for task in world.benchmark:
        labels, right, firsts = labels_of(world, protocol, task), 0, Counter[str]()
        for image, label in items(task):
            if protocol == "task-id" and task.name in world.prototypes:
                weights = {task.name: 1.0}
                firsts[task.name] += 1
            else:
                weights = voters(world, experts[NONE], image, voting)
                firsts[first_choice(world, experts[NONE], image)] += 1
            scores = [0.0] * len(labels)
            for name, weight in weights.items():
                said = logits(experts[name], image, labels)
                if voting.space == "probabilities":
                    said = softmax(said)
                scores = [score + weight * s for score, s in zip(scores, said, strict=True)]
            answered = labels[scores.index(max(scores))]
            right += answered == (task, task.classnames[label])
        accuracies.append(100 * right / len(items(task)))
        votes.append([firsts[name] for name in world.prototypes.tasks])
    return accuracies, votes


VOTINGS = [*(SemanticVoting(k=k) for k in (1, 2, 3)), SemanticVoting.preset("code")]


@pytest.mark.parametrize("learned", [1, 2, 3])
@pytest.mark.parametrize("voting", VOTINGS, ids=["k=1", "k=2", "k=3", "code"])
def test_voting_over_unions_equals_brute_force(learned: int, voting: SemanticVoting) -> None:
    world = make_world(learned, CLASSES)
    rows = world.evaluator.fused_rows(world.fusion, world.prototypes, voting, protocols=EVERY)
    for protocol, row in rows.items():
        accuracies, votes = expected_row(world, protocol, voting)
        assert row.accuracy == pytest.approx(accuracies, abs=1e-9), protocol
        assert row.votes == votes, protocol
    # nothing is compared if every label set is answered alike
    assert rows["union-x-tail"] != rows["agnostic"]
    if learned > 1:
        assert rows["union-odcl-cil"] not in (rows["agnostic"], rows["union-x-tail"])


def test_protocols_in_one_pass_are_what_each_is_alone() -> None:
    world, voting = make_world(2, CLASSES), SemanticVoting(k=2)
    together = world.evaluator.fused_rows(world.fusion, world.prototypes, voting, protocols=EVERY)
    for protocol in EVERY:
        fresh = Evaluator(world.clip, world.benchmark, batch_size=4)
        alone = fresh.fused_rows(world.fusion, world.prototypes, voting, protocols=[protocol])
        assert alone == {protocol: together[protocol]}


def test_an_expert_encodes_each_image_and_each_prompt_once_for_all_protocols() -> None:
    world, voting = make_world(3, CLASSES), SemanticVoting(k=3, weights="uniform")
    evaluator = Evaluator(world.clip, world.benchmark, batch_size=100)
    for session in range(2):
        world.seen.clear()
        evaluator.fused_rows(world.fusion, world.prototypes, voting, protocols=EVERY)
        texts = Counter(
            (active, tuple(tokens.flatten().tolist())) for active, tokens in world.forwards("text")
        )
        images = Counter(
            (active, tuple(image.tolist()))
            for active, batch in world.forwards("visual")
            for image in batch
        )
        assert set(texts.values()) == set(images.values()) == {1}
        answering = 3 if session else 4  # the pretrained model in the first session alone
        assert len(texts) == answering * 4
        assert len(images) == answering * (23 + 17 + 11 + 13)


# One model for everything


def expected_of_one_model(world: World, protocol: str) -> list[float]:
    model, row = model_now(world), []
    for task in world.benchmark:
        labels = labels_of(world, protocol, task)
        said = [logits(model, image, labels) for image, _ in items(task)]
        names = [labels[values.index(max(values))] for values in said]
        truth = [(task, task.classnames[label]) for _, label in items(task)]
        right = sum(found == true for found, true in zip(names, truth, strict=True))
        row.append(100 * right / len(truth))
    return row


@pytest.mark.parametrize("learned", [1, 3])
def test_rows_of_live_weights_equal_brute_force(learned: int) -> None:
    world = make_world(learned, CLASSES)
    frozen = world.evaluator.frozen_rows(learned, EVERY)
    assert frozen == world.evaluator.rows(learned, EVERY)
    with world.fusion.expert("one"):
        live = world.evaluator.rows(learned, EVERY)
        for protocol in EVERY:
            found = live[protocol]
            assert found.votes is None
            assert found.accuracy == pytest.approx(expected_of_one_model(world, protocol))
        assert live != frozen
        assert world.evaluator.frozen_rows(learned, EVERY) == frozen  # whatever is live now


def test_rows_of_the_pretrained_model_encode_nothing_twice() -> None:
    world = make_world(3, CLASSES)
    first = world.evaluator.frozen_rows(1, EVERY)
    world.seen.clear()
    later = world.evaluator.frozen_rows(3, EVERY)
    assert world.seen == []
    assert later["union-x-tail"] == first["union-x-tail"]
    assert later["union-odcl-cil"] != first["union-odcl-cil"]  # there are more labels


# Who answers in whose place


def test_without_experts_the_pretrained_model_answers() -> None:
    world = make_world(3, CLASSES)
    rows = world.evaluator.fused_rows(
        None, world.prototypes, SemanticVoting(k=1), protocols=EVERY, own_classes=False
    )
    frozen = world.evaluator.frozen_rows(3, EVERY)
    assert {p: row.accuracy for p, row in rows.items()} == {
        p: row.accuracy for p, row in frozen.items()
    }


@pytest.mark.parametrize("by_experts", [True, False])
def test_an_expert_may_be_kept_to_the_classes_of_its_own_task(by_experts: bool) -> None:
    world, protocols = make_world(3, CLASSES), EVERY[:3]
    rows = world.evaluator.fused_rows(
        world.fusion if by_experts else None,
        world.prototypes,
        SemanticVoting(k=1),
        protocols=protocols,
        own_classes=True,
    )
    experts = models(world)
    wide = world.evaluator.frozen_rows(3, ["union-odcl-cil"])["union-odcl-cil"]
    for position, task in enumerate(world.benchmark):
        right, named_votes = 0, Counter[str]()
        for image, label in items(task):
            named = first_choice(world, experts[NONE], image)
            named_votes[named] += 1
            # nobody is asked to tell tasks apart where the data set was not learnt
            chosen = world.benchmark[named] if task.name in world.prototypes else task
            labels = classes_of([chosen])
            said = logits(experts[named if by_experts else NONE], image, labels)
            answer = labels[said.index(max(said))]
            right += answer == (task, task.classnames[label])
        row = rows["union-odcl-cil"]
        assert row.accuracy[position] == pytest.approx(100 * right / len(items(task)))
        assert row.votes is not None
        assert row.votes[position] == [named_votes[name] for name in world.prototypes.tasks]
    assert row.accuracy != wide.accuracy


def test_own_classes_take_probabilities() -> None:
    world, voting = make_world(1, CLASSES), SemanticVoting.preset("code")
    with pytest.raises(ValueError, match="probabilities, got space 'logits'"):
        world.evaluator.fused_rows(world.fusion, world.prototypes, voting, own_classes=True)


# The same name twice


def test_a_class_of_the_same_name_in_another_task_is_another_class() -> None:
    """Image e_0 is a `a` of both tasks; the first task says it with a template that is nearer."""
    model: Any = StubClip()
    eye = torch.eye(6)
    with torch.no_grad():
        model.visual = nn.Identity()
        model.text.weight.copy_(eye[[5] * len(model.text.weight)])
        for prompt, vector in (
            ("xa", eye[0]),
            ("ya", 0.8 * eye[0] + 0.6 * eye[3]),
            ("xb", eye[1]),
            ("yc", eye[2]),
        ):
            model.text.weight[int(tokenize([prompt]))] = vector
    clip: Any = Clip(model, tokenize, identity)
    images: Any = [(eye[0], 0)]
    near = Task("near", ("a", "b"), ("x{}",), lambda split: images)
    far = Task("far", ("a", "c"), ("y{}",), lambda split: images)
    evaluator = Evaluator(clip, Benchmark("b", (near, far)))
    assert evaluator.rows(2, EVERY) == {
        "task-id": Row([100.0, 100.0]),
        "agnostic": Row([100.0, 100.0]),
        "union-odcl-cil": Row([100.0, 0.0]),
        "union-x-tail": Row([100.0, 0.0]),
    }


# Label sets


def test_label_sets_by_hand() -> None:
    a, b, c, d = make_world(0, CLASSES).benchmark  # of 2, 3, 2 and 2 classes

    def of(protocol: Protocol, task: Task) -> tuple[str, int, int]:
        labels = label_set(protocol, task, (a, b, c, d), ("three", "one"))
        return " ".join(labels.names), labels.first, labels.size

    for task in (a, b, c, d):
        for protocol in EVERY[:2]:
            assert of(protocol, task) == (task.name, 0, len(task.classnames))
    assert of("union-odcl-cil", a) == ("one three", 0, 4)
    assert of("union-odcl-cil", c) == ("one three", 2, 4)
    assert of("union-odcl-cil", b) == ("two", 0, 3)
    assert of("union-x-tail", c) == ("one two three unseen", 5, 9)
    assert label_set("union-x-tail", c, (a, b, c, d), ()).block("two") == slice(2, 5)


def test_a_union_needs_the_tasks_of_the_benchmark() -> None:
    world = make_world(2, CLASSES)
    stranger = Task("stranger", ("a",), ("x{}",), world.benchmark["one"].load)
    tasks, wrong = world.benchmark.tasks, "task 'stranger' is not one of the benchmark's"
    assert label_set("agnostic", stranger, tasks, ()).names == ("stranger",)
    with pytest.raises(ValueError, match=f"union-x-tail: {wrong}"):
        label_set("union-x-tail", stranger, tasks, ())
    with pytest.raises(ValueError, match=f"union-odcl-cil: {wrong}"):
        label_set("union-odcl-cil", tasks[0], tasks, ("one", "stranger"))
