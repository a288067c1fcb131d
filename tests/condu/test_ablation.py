"""What `condu ablate` finds, against runs that were configured so and against definitions."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from tiny_run import tiny_benchmark, tiny_clip, tiny_config, tiny_trainer
from torch import Tensor
from torch.nn.functional import normalize

import condu_ext as cx
from condu import trainer
from condu.ablation import ablate
from condu.ablation.answers import SessionAnswers
from condu.ablation.fusing import Fusing
from condu.ablation.ground import Ground
from condu.ablation.models import finetuned_models
from condu.ablation.variants import Variant, variants
from condu.fusion import ConDU
from condu.models.clip import ClipModel
from condu.progress import RunProgress
from condu.prototypes import PrototypeSet
from condu.voting import SemanticVoting
from condu.weights import copy_weights, load_weights
from condu.workspace import Workspace

BOTH = ("task-id", "agnostic")


@pytest.fixture(autouse=True, scope="module")
def _tiny() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trainer, "make_benchmark", lambda config: tiny_benchmark())
        patch.setattr(trainer, "load_model", lambda name, pretrained: tiny_clip())
        yield


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run that votes for one expert, so that K = 2 is something else."""
    out = tmp_path_factory.mktemp("runs") / "run"
    tiny_trainer(out, methods=["individual", "condu"], voting={"k": 1}).run()
    return out


@pytest.fixture(scope="module")
def found(run: Path) -> dict[str, Any]:
    return ablate(run)


def row(found: dict[str, Any], name: str) -> dict[str, Any]:
    (only,) = (row for row in found["rows"] if row["name"] == name)
    return only


def matrices(protocols: dict[str, Any]) -> dict[str, Any]:
    return {protocol: protocols[protocol]["matrix"] for protocol in BOTH}


def condu_of(out: Path) -> dict[str, Any]:
    """The matrices of the method condu in a run's results."""
    method = json.loads((out / "results.json").read_text())["methods"]["condu"]
    return matrices(method["protocols"])


def weights_of(run: Path) -> list[dict[str, Tensor]]:
    return [load_weights(run / "finetuned" / f"00{i}.safetensors") for i in range(2)]


# Which variants there are


def test_every_variant_differs_from_the_default_in_one_thing() -> None:
    default = Variant("default", "condu", Fusing(), SemanticVoting())
    every = variants(default, tasks=7)
    assert every[0] == default
    assert len({replace(v, group="", name="") for v in every}) == len(every)
    for variant in every[1:]:
        parts = [
            variant.half,
            variant.fusing != default.fusing and not variant.half,
            variant.voting != default.voting,
            variant.prototypes != default.prototypes,
        ]
        assert sum(parts) == 1, variant
        for part in ("fusing", "voting"):
            mine, other = vars(getattr(variant, part)), vars(getattr(default, part))
            assert sum(mine[field] != other[field] for field in mine) <= 1
    named = {variant.name for variant in every}
    assert {f"K = {k}" for k in (1, 2, 3, 5, 6, 7)} <= named
    assert "K = 4" not in named
    assert len(named) == len(every)


def test_more_experts_than_tasks_are_all_of_them() -> None:
    default = Variant("default", "condu", Fusing(), SemanticVoting(k=4))
    assert {v.name for v in variants(default, tasks=3)} >= {"K = 1", "K = 2"}
    assert "K = 3" not in {v.name for v in variants(default, tasks=3)}


def test_what_the_default_has_already_is_no_variant() -> None:
    code = replace(SemanticVoting.preset("code"), weights="softmax")
    default = Variant("default", "condu", Fusing(rescale="tensor_mean"), code)
    named = {v.name for v in variants(default, tasks=2)}
    assert named >= {"rescaler global", "without the pretrained model", "mean of probabilities"}
    assert not named & {"rescaler tensor_mean", "mean of logits", "weights softmax"}


# Against runs that were configured so


def test_the_default_is_the_run_to_the_digit(run: Path, found: dict[str, Any]) -> None:
    assert matrices(found["rows"][0]["protocols"]) == condu_of(run)
    assert found["tasks"] == ["hues", "tones"]


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("rescaler per_tensor", {"fusion": {"rescale": "per_tensor"}}),
        ("rescaler tensor_mean", {"fusion": {"rescale": "tensor_mean"}}),
        ("K = 2", {"voting": {"k": 2}}),
        ("with the pretrained model", {"voting": {"k": 1, "include_pretrained": True}}),
    ],
)
def test_a_variant_is_what_a_run_with_that_setting_finds(
    found: dict[str, Any], tmp_path: Path, name: str, changes: dict[str, Any]
) -> None:
    tiny_trainer(tmp_path / "run", methods=["condu"], **{"voting": {"k": 1}, **changes}).run()
    assert matrices(row(found, name)["protocols"]) == condu_of(tmp_path / "run")


def test_the_default_takes_its_rule_and_its_votes_from_the_run(tmp_path: Path) -> None:
    fusion = {"zero_sum": "zero", "rescale": "per_tensor", "state_dtype": "bfloat16"}
    out = tmp_path / "run"
    tiny_trainer(out, methods=["condu"], fusion=fusion, voting={"preset": "code"}).run()
    default = ablate(out, last=True)["rows"][0]
    expected = condu_of(out)
    for protocol in BOTH:
        assert default["protocols"][protocol]["matrix"] == expected[protocol][-1:]


def test_after_the_last_task_only(run: Path, found: dict[str, Any]) -> None:
    short = ablate(run, last=True)
    assert len(short["rows"]) == len(found["rows"])
    for mine, whole in zip(short["rows"], found["rows"], strict=True):
        assert mine["ties"] == whole["ties"]
        for protocol in BOTH:
            table, other = mine["protocols"][protocol], whole["protocols"][protocol]
            assert table["matrix"] == other["matrix"][-1:]
            assert table["last"] == other["last"]
            assert (table["transfer"], table["average"]) == (None, None)
            assert other["transfer"] == other["matrix"][0][1]


# 16-bit checkpoints


@pytest.mark.parametrize("kind", ["negative", "positive", "zero"])
def test_sixteen_bits_are_a_run_of_rounded_models(
    run: Path, found: dict[str, Any], kind: Any
) -> None:
    def rounded(weights: dict[str, Tensor]) -> dict[str, Tensor]:
        return {n: t.bfloat16().float() for n, t in weights.items()}

    clip, benchmark = tiny_clip(), tiny_benchmark()
    clip.model.load_state_dict(rounded(clip.model.state_dict()))
    clip.model.logit_scale.requires_grad_(False)
    fusion = ConDU(clip.model, rule=cx.FusionRule(zero_sum=kind))
    evaluator = clip.evaluator(benchmark, batch_size=16)
    prototypes = PrototypeSet()
    expected: dict[str, list[list[float]]] = {protocol: [] for protocol in BOTH}
    for task, weights in zip(benchmark, weights_of(run), strict=True):
        clip.model.load_state_dict(rounded(weights))
        fusion.absorb(task.name)
        evaluator.add_prototypes(prototypes, task, fusion)
        rows = evaluator.fused_rows(fusion, prototypes, SemanticVoting(k=1))
        for protocol, of_protocol in rows.items():
            expected[protocol].append(list(of_protocol.accuracy))
    assert matrices(row(found, f"bfloat16, ties {kind}")["protocols"]) == expected


def test_ties_are_counted(run: Path, found: dict[str, Any]) -> None:
    start = tiny_clip().model.state_dict()

    def delta(weights: dict[str, Tensor]) -> Tensor:
        return torch.cat(
            [
                (t.bfloat16().float() - start[n].bfloat16().float()).flatten()
                for n, t in weights.items()
                if n != "logit_scale"
            ]
        )

    first, second = (delta(weights) for weights in weights_of(run))
    moved = second != 0
    expected = ((first + second == 0) & moved).sum() / moved.sum()
    assert expected > 0.001
    for kind in ("negative", "positive", "zero"):
        ties = row(found, f"bfloat16, ties {kind}")["ties"]
        assert ties == pytest.approx(expected.item(), rel=1e-6)
    assert found["rows"][0]["ties"] == 0


# Prototypes


@pytest.fixture(scope="module")
def ground(run: Path) -> Ground:
    config = tiny_config(methods=["individual", "condu"], voting={"k": 1})
    shared = Workspace(tiny_clip(), tiny_benchmark(), config, run, Accelerator(), RunProgress())
    return Ground(shared, finetuned_models(shared))


def raw_features(clip: ClipModel, task: Any) -> tuple[list[Tensor], list[Tensor]]:
    """Per class the features of its training images and those of its prompts, as they are."""
    examples = task.load("train")
    with torch.no_grad():
        images = [
            clip.model.encode_image(
                torch.stack([clip.test_transform(image) for image, y in examples if y == label])
            )
            for label in range(len(task.classnames))
        ]
        text = [
            clip.model.encode_text(clip.tokenize([t.format(name) for t in task.templates]))
            for name in task.classnames
        ]
    return images, text


def unit(features: Tensor) -> Tensor:
    return normalize(features, dim=-1)


def mean(features: list[Tensor]) -> Tensor:
    return torch.stack([of_class.mean(0) for of_class in features])


def test_rounded_models_are_asked_about_images_that_are_decoded_already(ground: Ground) -> None:
    half = Ground(ground._workspace, ground.models, half=True)
    task = ground.benchmark.tasks[0]
    ground.scorer.accuracy(task)
    assert half.scorer._tests[task] is ground.scorer._tests[task]
    mine, its = (g.scorer.frozen_answers(task) for g in (ground, half))
    assert torch.equal(mine.labels, its.labels)
    assert not torch.equal(mine.features, its.features)
    torch.testing.assert_close(mine.features, its.features, atol=0.05, rtol=0)


@pytest.mark.parametrize("kind", ["both", "images", "text", "unnormalised"])
def test_prototypes_are_what_their_definition_says(ground: Ground, kind: Any) -> None:
    clip = tiny_clip()
    clip.model.eval()
    for task in tiny_benchmark():
        raw_images, raw_text = raw_features(clip, task)
        images = mean([unit(of_class) for of_class in raw_images])
        text = mean([unit(of_class) for of_class in raw_text])
        expected = {
            "both": images + text,
            "images": images,
            "text": text,
            "unnormalised": mean(raw_images) + mean(raw_text),
        }[kind]
        prototypes = ground.prototypes(kind, 2)[task.name]
        torch.testing.assert_close(prototypes, unit(expected), atol=1e-5, rtol=1e-5)
    assert ground.prototypes(kind, 1).tasks == ("hues",)


def test_each_expert_compares_with_prototypes_of_its_own(run: Path, found: dict[str, Any]) -> None:
    clip, benchmark = tiny_clip(), tiny_benchmark()
    clip.model.logit_scale.requires_grad_(False)
    fusion = ConDU.from_pretrained(run / "condu" / "state", clip.model.eval())
    similar, heads = [], []
    for name in fusion.tasks:
        with fusion.expert(name), torch.no_grad():
            images, text = raw_features(clip, benchmark[name])
            own = unit(mean([unit(i) for i in images]) + mean([unit(t) for t in text]))
            similar.append([])
            heads.append([])
            for task in benchmark:
                pixels = torch.stack([clip.test_transform(image) for image, _ in task.load("test")])
                features = unit(clip.model.encode_image(pixels))
                similar[-1].append((features @ own.T).amax(1))
                _, text = raw_features(clip, task)
                head = unit(mean([unit(t) for t in text]))
                heads[-1].append((features @ head.T).argmax(1))
    expected = []
    for place, task in enumerate(benchmark):
        labels = torch.tensor([label for _, label in task.load("test")])
        best = torch.stack([s[place] for s in similar], 1).argmax(1)
        answers = torch.stack([h[place] for h in heads], 1).gather(1, best.unsqueeze(1))[:, 0]
        expected.append(float((answers == labels).double().mean() * 100))
    table = row(found, "of each expert")["protocols"]["agnostic"]
    assert table["matrix"][-1] == pytest.approx(expected)


def test_the_model_is_the_pretrained_one_again(ground: Ground) -> None:
    before = copy_weights(ground.clip.model)
    experts = ground.experts(Fusing())
    experts.absorb("hues", ground.finetuned(0))
    answers = SessionAnswers(ground, experts)
    after = copy_weights(ground.clip.model)
    assert all(torch.equal(before[name], after[name]) for name in before)
    default = Variant("default", "condu", Fusing(), SemanticVoting())
    assert len(answers.row(default, "agnostic")) == 2
