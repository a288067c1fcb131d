from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from stub_world import (
    DIM,
    WORDS,
    Clip,
    StubClip,
    World,
    identity,
    items,
    labels_of,
    make_world,
    tokenize,
)
from torch import Tensor, nn
from torch.nn.functional import normalize
from torch.utils.data import TensorDataset

from condu.evaluation import Evaluator, Protocol, zero_shot_head
from condu.features import encode_images
from condu.fusion import ConDU
from condu.prototypes import PrototypeSet
from condu.tasks.benchmark import Benchmark, Task
from condu.voting import SemanticVoting


@pytest.fixture
def world() -> World:
    return make_world()


def logits_now(world: World, task: Task) -> Tensor:
    """Straight from the definition: every test image, all templates, live weights."""
    model = world.clip.model.eval()
    with torch.no_grad():
        images = torch.stack([image for image, _ in items(task)])
        features = normalize(model.encode_image(images), dim=-1)
        head = torch.stack(
            [
                normalize(
                    model.encode_text(tokenize([t.format(c) for t in task.templates])), dim=-1
                ).mean(dim=0)
                for c in task.classnames
            ]
        )
        return model.logit_scale.exp() * features @ normalize(head, dim=-1).T


def percent(scores: Tensor, task: Task) -> float:
    return float((scores.argmax(dim=1) == labels_of(task)).double().mean() * 100)


def brute_force(world: World, task: Task, voting: SemanticVoting) -> tuple[float, list[int]]:
    """All experts answer all images; the votes choose afterwards. Also on how many images each task
    has the most similar prototype."""
    world.fusion.reset()
    with torch.no_grad():
        images = torch.stack([image for image, _ in items(task)])
        features = normalize(world.clip.model.eval().encode_image(images), dim=-1)
    votes = voting.vote(features, world.prototypes)
    names = world.prototypes.tasks
    best = torch.stack([(features @ world.prototypes[name].T).amax(dim=1) for name in names])
    nearest = Counter(best.argmax(dim=0).tolist())
    answers = []
    for name in world.prototypes.tasks:
        with world.fusion.expert(name):
            answers.append(logits_now(world, task))
    answers.append(logits_now(world, task))  # -1 is the pretrained model
    all_logits = torch.stack(answers, dim=1)
    rows = torch.arange(len(images)).unsqueeze(1)
    fused = voting.fuse(all_logits[rows, votes.experts], votes.weights)
    return percent(fused, task), [nearest[e] for e in range(len(names))]


VOTINGS = [
    SemanticVoting(k=1),
    SemanticVoting(k=2),
    SemanticVoting.preset("paper"),
    SemanticVoting.preset("code"),
    SemanticVoting(k=2, weights="softmax", temperature=0.2, include_pretrained=True),
]


@pytest.mark.parametrize("voting", VOTINGS, ids=str)
def test_agnostic_equals_brute_force(voting: SemanticVoting, world: World) -> None:
    row = world.evaluator.fused_rows(world.fusion, world.prototypes, voting)["agnostic"]
    for i, task in enumerate(world.benchmark):
        accuracy, nearest = brute_force(world, task, voting)
        assert row.accuracy[i] == pytest.approx(accuracy, abs=1e-9)
        assert row.votes[i] == nearest  # and not how many experts were asked
        single = world.evaluator.agnostic_accuracy(task, world.fusion, world.prototypes, voting)
        assert single == row.accuracy[i]


def test_task_id_takes_the_own_expert_and_votes_on_unseen_datasets(world: World) -> None:
    voting = SemanticVoting(k=2)
    row = world.evaluator.fused_rows(world.fusion, world.prototypes, voting)["task-id"]
    for i, task in enumerate(world.benchmark.tasks[:3]):
        with world.fusion.expert(task.name):
            assert row.accuracy[i] == pytest.approx(percent(logits_now(world, task), task))
        assert row.votes[i] == [len(labels_of(task)) * (e == i) for e in range(3)]
    unseen = world.benchmark["unseen"]
    assert row.accuracy[3] == pytest.approx(brute_force(world, unseen, voting)[0])


def test_both_protocols_in_one_pass_are_what_each_is_alone(world: World) -> None:
    voting = SemanticVoting(k=2)
    both = world.evaluator.fused_rows(world.fusion, world.prototypes, voting)
    for protocol in both:
        alone = world.evaluator.fused_rows(
            world.fusion, world.prototypes, voting, protocols=[protocol]
        )
        assert alone == {protocol: both[protocol]}


@pytest.mark.parametrize("voting", VOTINGS[:2] + VOTINGS[3:4], ids=str)
def test_no_expert_sees_an_image_that_did_not_vote_for_it(
    voting: SemanticVoting, world: World
) -> None:
    world.evaluator.fused_rows(world.fusion, world.prototypes, voting, protocols=["agnostic"])
    for task in world.benchmark:
        shown = world.images_by_expert(task)
        count = len(labels_of(task))
        assert shown.pop(None) == list(range(count))  # the pretrained model, once
        images = torch.stack([image for image, _ in items(task)])
        votes = voting.vote(encode_images(world.clip.model, _pairs(images))[0], world.prototypes)
        for e, name in enumerate(world.prototypes.tasks):
            voters = (votes.experts == e).any(dim=1).nonzero().flatten().tolist()
            assert shown.get(name, []) == voters
        total = sum(len(images) for images in shown.values())
        assert total <= voting.k * count


def _pairs(images: Tensor) -> Any:
    return [(image, 0) for image in images]


def test_each_expert_is_decoupled_once_and_has_one_head_per_label_set(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    activated: list[str] = []
    activate = world.fusion.activate

    def counted(task: str) -> None:
        activated.append(task)
        activate(task)

    monkeypatch.setattr(world.fusion, "activate", counted)
    voting = SemanticVoting(k=3)  # everybody answers everything
    evaluator = Evaluator(world.clip, world.benchmark, batch_size=100)
    for session in range(2):
        activated.clear()
        world.seen.clear()
        evaluator.fused_rows(world.fusion, world.prototypes, voting)
        assert activated == ["one", "two", "three"]
        encoded = Counter(
            (active, tuple(sorted(tokens.tolist()))) for active, tokens in world.forwards("text")
        )
        assert set(encoded.values()) == {1}
        # what the pretrained model says is computed in the first session only
        models = {None, "one", "two", "three"} if session == 0 else {"one", "two", "three"}
        assert {active for active, _ in encoded} == models
        assert len(encoded) == 4 * len(models)
        assert {active for active, _ in world.forwards("visual")} == models


def test_an_expert_without_voters_is_not_decoupled(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    task = world.benchmark["one"]
    voting = SemanticVoting(k=1)
    votes = voting.vote(
        encode_images(world.clip.model, task.dataset("test", identity))[0], world.prototypes
    )
    absent = set(range(3)) - set(votes.experts.flatten().tolist())
    assert absent, "the toy data no longer has an expert without voters"
    names = [world.prototypes.tasks[e] for e in absent]
    activate = world.fusion.activate

    def guarded(name: str) -> None:
        assert name not in names
        activate(name)

    monkeypatch.setattr(world.fusion, "activate", guarded)
    world.evaluator.agnostic_accuracy(task, world.fusion, world.prototypes, voting)


def test_accuracy_is_that_of_the_live_weights(world: World) -> None:
    task = world.benchmark["two"]
    before = world.evaluator.accuracy(task)
    assert before == pytest.approx(percent(logits_now(world, task), task))
    with torch.no_grad():
        world.clip.model.visual[2].weight.neg_()
        world.clip.model.visual[2].bias.neg_()
    after = world.evaluator.accuracy(task)
    assert after != before
    assert after == pytest.approx(percent(logits_now(world, task), task))


def test_accuracy_by_hand() -> None:
    clip: Any = Clip(StubClip(), tokenize, identity)
    with torch.no_grad():
        clip.model.visual = nn.Identity()
        clip.model.text.weight.zero_()
        clip.model.text.weight[:9] = torch.eye(DIM)[[0, 0, 0, 1, 1, 1, 2, 2, 2]]
    right, wrong = (torch.eye(DIM)[0], 0), (torch.eye(DIM)[0], 2)
    images: Any = [right, wrong, right]
    task = Task("t", ("a", "b", "c"), ("x{}", "y{}", "z{}"), lambda split: images)
    evaluator = Evaluator(clip, Benchmark("b", (task,)))
    assert evaluator.accuracy(task) == 200 / 3


def test_zero_shot_head_averages_normalised_templates(world: World) -> None:
    model, task = world.clip.model, world.benchmark["one"]
    with torch.no_grad():
        model.text.weight[0] *= 100  # a long feature must not outweigh the other templates
    expected = normalize(model.text.weight[:9].detach(), dim=-1).view(3, 3, DIM).mean(dim=1)
    for batch_size in (1, 4, 256):
        head = zero_shot_head(model, tokenize, task, batch_size=batch_size)
        torch.testing.assert_close(head, normalize(expected, dim=-1))
    assert head.dtype == torch.float32
    assert not head.requires_grad


def test_add_prototypes_uses_frozen_training_features(world: World) -> None:
    task = world.benchmark["one"]
    world.fusion.activate("two")  # add_prototypes has to get back to θ_0 by itself
    again = PrototypeSet()
    world.evaluator.add_prototypes(again, task, world.fusion)
    torch.testing.assert_close(again["one"], world.prototypes["one"])

    model = world.clip.model
    train = items(task, "train")
    with torch.no_grad():
        images = normalize(model.eval().visual(torch.stack([image for image, _ in train])), dim=-1)
        text = normalize(model.text.weight[:9], dim=-1).view(3, 3, DIM).mean(dim=1)
    labels = torch.tensor([label for _, label in train])
    expected = torch.stack([images[labels == c].mean(dim=0) for c in range(3)]) + text
    torch.testing.assert_close(again["one"], normalize(expected, dim=-1))


def test_a_pass_starts_from_the_pretrained_weights_by_itself(world: World) -> None:
    voting = SemanticVoting.preset("code")
    rows = world.evaluator.fused_rows(world.fusion, world.prototypes, voting)
    world.fusion.activate("two")
    fresh = Evaluator(world.clip, world.benchmark, batch_size=4)
    assert fresh.fused_rows(world.fusion, world.prototypes, voting) == rows


def test_streamed_and_cached_test_sets_agree(world: World) -> None:
    voting = SemanticVoting(k=2)
    rows = world.evaluator.fused_rows(world.fusion, world.prototypes, voting)
    one_fits = 23 * DIM * 4
    for cache_bytes in (0, one_fits):
        streamed = Evaluator(world.clip, world.benchmark, batch_size=4, cache_bytes=cache_bytes)
        assert streamed.fused_rows(world.fusion, world.prototypes, voting) == rows


def test_test_images_are_decoded_once_while_they_fit() -> None:
    world = make_world(learned=0)
    decoded = Counter[str]()

    def counted(task: Task) -> Task:
        tagged: Any = [((task.name, image), label) for image, label in items(task)]
        return Task(task.name, task.classnames, task.templates, lambda split: tagged)

    def count(image: tuple[str, Tensor]) -> Tensor:
        decoded[image[0]] += 1
        return image[1]

    world.clip.test_transform = count
    one, two, three = (counted(task) for task in world.benchmark.tasks[:3])  # 23, 17, 11 images
    # the first fits, the second then does not, the third does again
    evaluator = Evaluator(world.clip, world.benchmark, cache_bytes=(23 + 11) * DIM * 4)
    for task in (one, two, three):
        evaluator.accuracy(task)
    first = Counter(decoded)
    for task in (one, two, three):
        evaluator.accuracy(task)
    assert decoded - first == {"two": 17}
    # the same memory serves every model
    other = evaluator.over(world.clip)
    other.accuracy(two)
    assert decoded - first == {"two": 2 * 17}


@pytest.mark.parametrize("indices", [None, [5, 0, 5, 2]])
@pytest.mark.parametrize("batch_size", [1, 3, 100])
def test_encode_images_of_any_dataset(indices: list[int] | None, batch_size: int) -> None:
    torch.manual_seed(0)
    model = StubClip()
    images, labels = torch.randn(7, DIM), torch.arange(7)
    rows = torch.arange(7) if indices is None else torch.tensor(indices)
    expected = normalize(model.eval().visual(images)[rows], dim=-1)
    pairs: Any = list(zip(images, labels.tolist(), strict=True))
    for dataset in (TensorDataset(images, labels), pairs):
        features, got = encode_images(
            model, dataset, None if indices is None else rows, batch_size=batch_size
        )
        torch.testing.assert_close(features, expected)
        assert torch.equal(got, rows)
        assert not features.requires_grad


def test_training_modes_are_restored(world: World) -> None:
    model = world.clip.model
    model.train()
    model.visual[0].eval()
    modes = [module.training for module in model.modules()]
    world.evaluator.accuracy(world.benchmark["one"])
    world.evaluator.fused_rows(world.fusion, world.prototypes, SemanticVoting())
    assert [module.training for module in model.modules()] == modes


def test_weights_are_restored_after_an_error(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    model = world.clip.model
    base = {name: value.clone() for name, value in model.state_dict().items()}
    encode = model.encode_image

    def broken(images: Tensor) -> Tensor:
        if world.fusion.active == "two":
            raise RuntimeError("out of memory")
        return encode(images)

    monkeypatch.setattr(model, "encode_image", broken)
    model.train()
    with pytest.raises(RuntimeError, match="out of memory"):
        world.evaluator.fused_rows(world.fusion, world.prototypes, SemanticVoting(k=3))
    assert world.fusion.active is None
    assert model.training
    assert all(torch.equal(value, base[n]) for n, value in model.state_dict().items())


def test_bad_calls(world: World) -> None:
    evaluator, fusion, prototypes = world.evaluator, world.fusion, world.prototypes
    protocols: Any = ["union"]
    with pytest.raises(ValueError, match=r"protocol must be .*'task-id'.*'union'"):
        evaluator.fused_rows(fusion, prototypes, SemanticVoting(), protocols=protocols)
    nothing: Any = []
    empty = Task("empty", ("a",), ("x{}",), lambda split: nothing)
    with pytest.raises(ValueError, match="'empty': the test set is empty"):
        evaluator.accuracy(empty)
    with pytest.raises(ValueError, match="'empty': the test set is empty"):
        evaluator.agnostic_accuracy(empty, fusion, prototypes, SemanticVoting())
    with pytest.raises(ValueError, match="'empty': the train set is empty"):
        evaluator.add_prototypes(prototypes, empty, fusion)
    prototypes.drop("two")
    with pytest.raises(ValueError, match=r"\['one', 'three'\] but experts of .*'two'"):
        evaluator.fused_rows(fusion, prototypes, SemanticVoting())


def test_a_real_open_clip_model() -> None:
    open_clip = pytest.importorskip("open_clip")
    torch.manual_seed(0)
    model = open_clip.CLIP(
        embed_dim=8,
        vision_cfg={"layers": 1, "width": 16, "head_width": 8, "patch_size": 4, "image_size": 8},
        text_cfg={"context_length": 4, "vocab_size": 30, "width": 16, "heads": 2, "layers": 1},
    )

    def tokens(prompts: Sequence[str]) -> Tensor:
        return torch.tensor([[WORDS.index(p) + 1, 29, 0, 0] for p in prompts])

    def load(split: str) -> Any:
        generator = torch.Generator().manual_seed(len(split))
        return [(torch.randn(3, 8, 8, generator=generator), i % 3) for i in range(12)]

    task = Task("real", ("a", "b", "c"), ("x{}", "y{}"), load)
    clip: Any = Clip(model, tokens, identity)
    evaluator = Evaluator(clip, Benchmark("b", (task,)))
    fusion, prototypes = ConDU(model), PrototypeSet()
    # not the logit scale, nor attn_mask, a buffer with infinities that is in no state dict
    assert set(fusion.pretrained) == {n for n, _ in model.named_parameters()} - {"logit_scale"}
    zero_shot = evaluator.accuracy(task)

    optimizer = torch.optim.AdamW(
        [p for n, p in model.named_parameters() if n != "logit_scale"], lr=3e-3, weight_decay=0
    )
    images = torch.stack([image for image, _ in load("test")])
    labels = torch.tensor([label for _, label in load("test")])
    for _ in range(40):
        text = model.encode_text(tokens(["xa", "xb", "xc"]), normalize=True)
        logits = model.logit_scale.exp() * model.encode_image(images, normalize=True) @ text.T
        optimizer.zero_grad()
        nn.functional.cross_entropy(logits, labels).backward()
        optimizer.step()
    finetuned = evaluator.accuracy(task)
    assert finetuned > zero_shot

    fusion.absorb("real")
    assert evaluator.accuracy(task) == zero_shot
    evaluator.add_prototypes(prototypes, task, fusion)
    rows = evaluator.fused_rows(fusion, prototypes, SemanticVoting(k=1))
    protocols: tuple[Protocol, ...] = ("task-id", "agnostic")
    assert [rows[p].accuracy for p in protocols] == [[finetuned], [finetuned]]
