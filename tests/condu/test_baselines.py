"""What the methods that keep a model from forgetting compute, against plain computations."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from accelerate.utils import set_seed
from tiny_run import (
    outcome,
    run_in_two_processes,
    tiny_benchmark,
    tiny_clip,
    tiny_reference,
    tiny_trainer,
    tokenize,
)
from torch import Tensor

from condu.config import ConfigError, RunConfig, demo_config, make_config
from condu.config_sections import TrainingConfig
from condu.distillation import Distillation, distillation_loss
from condu.fusion import ConDU
from condu.methods.emr import EMR
from condu.methods.task_arithmetic import TaskArithmetic
from condu.methods.zscl import WeightAverage
from condu.runfolder import write_text
from condu.training import learning_rate, shuffled_batches, task_seed
from condu.weights import copy_weights, load_weights

STEPS = 5
SHORT: dict[str, Any] = {"training": {"steps": STEPS, "lr": 1e-3}}

Weights = dict[str, Tensor]


def trained(out: Path, *methods: str, **changes: Any) -> Path:
    tiny_trainer(out, methods=list(methods), **SHORT, **changes).run()
    return out


def assert_near(found: Weights, expected: Weights, bound: float = 1e-6) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        if not name.endswith("in_proj_bias"):  # keys' bias: no gradient, so Adam follows noise
            torch.testing.assert_close(found[name], value, atol=bound, rtol=0, msg=name)


def assert_trained_alike(found: Weights, expected: Weights) -> None:
    """Nearly all weights to 1e-6, after steps of 1e-3; where the gradient is rounding noise, Adam
    makes steps of it, of which few are as large as a tenth."""
    names = [name for name in expected if not name.endswith("in_proj_bias")]
    apart = torch.cat([(found[name] - expected[name]).abs().flatten() for name in names])
    assert apart.quantile(0.99).item() < 1e-6
    assert apart.quantile(0.999).item() < 1e-4


# WiSE-FT


def test_wise_ft_goes_a_fifth_of_the_way_back_after_every_task(tmp_path: Path) -> None:
    run = trained(tmp_path / "run", "wise_ft")
    start = copy_weights(tiny_clip().model)
    first = load_weights(run / "finetuned" / "000.safetensors")
    before = {name: 0.8 * first[name] + 0.2 * start[name] for name in first}
    second = load_weights(run / "wise_ft" / "finetuned.safetensors")
    expected = {name: 0.8 * second[name] + 0.2 * before[name] for name in first}
    assert_near(load_weights(run / "wise_ft" / "model.safetensors"), expected, 1e-7)
    assert not torch.equal(second["visual.proj"], before["visual.proj"])


def test_wise_ft_of_share_one_is_sequential(tmp_path: Path) -> None:
    run = trained(tmp_path / "run", "sequential", "wise_ft", wise_ft={"weight": 1})
    wise, plain = (load_weights(run / m / "model.safetensors") for m in ("wise_ft", "sequential"))
    assert all(torch.equal(wise[name], plain[name]) for name in plain)


# Task arithmetic


def test_task_arithmetic_adds_a_share_of_every_delta(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    merged: list[Weights] = []
    learn = TaskArithmetic.learn

    def watched(self: TaskArithmetic, index: int) -> Any:
        learned = learn(self, index)
        merged.append(self._weights)
        return learned

    monkeypatch.setattr(TaskArithmetic, "learn", watched)
    run = trained(tmp_path / "run", "task_arithmetic", task_arithmetic={"scale": 0.4})
    start = copy_weights(tiny_clip().model)
    models = [load_weights(run / "finetuned" / f"00{i}.safetensors") for i in (0, 1)]
    for count in (1, 2):
        expected = {
            name: start[name] + 0.4 * sum((m[name] - start[name] for m in models[:count]), 0)
            for name in merged[0]
        }
        assert_near(merged[count - 1], expected, 1e-7)
    assert set(merged[0]) == set(start) - {"logit_scale"}


# EMR-Merging


def emr_expert(models: list[Weights], start: Weights, task: int) -> Weights:
    """θ_0 + λ·M ⊙ u in float64: elect, mask and rescale (the paper's, over all elements)."""
    deltas = [torch.cat([(m[n].double() - start[n]).flatten() for n in start]) for m in models]
    sign = torch.where(sum(deltas) > 0, 1.0, -1.0)
    u = sign * torch.stack([(d * sign).clamp(min=0) for d in deltas]).amax(0)
    kept = torch.where(deltas[task] * sign > 0, u, 0.0)
    kept *= deltas[task].abs().sum() / kept.abs().sum()
    parts = kept.split([value.numel() for value in start.values()])
    return {n: start[n] + p.view_as(start[n]) for (n, p) in zip(start, parts, strict=True)}


def test_emr_unifies_the_fine_tuned_models_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fusions: list[ConDU] = []
    fuse = EMR.fuse

    def watched(self: EMR, index: int) -> float:
        fusions.append(self.fusion)
        return fuse(self, index)

    monkeypatch.setattr(EMR, "fuse", watched)
    trainer = tiny_trainer(tmp_path / "run", methods=["emr"], **SHORT)
    trainer.run()
    model = trainer.live.model
    start = {n: p.detach().clone() for n, p in model.named_parameters() if n != "logit_scale"}
    files = [tmp_path / "run" / "finetuned" / f"00{i}.safetensors" for i in (0, 1)]
    models = [load_weights(file) for file in files]
    assert fusions[-1].tasks == ("hues", "tones")
    for index, task in enumerate(fusions[-1].tasks):
        with fusions[-1].expert(task):
            found = {name: model.get_parameter(name).detach().clone() for name in start}
        expected = emr_expert(models, start, index)
        assert_near(found, {n: value.float() for n, value in expected.items()})


# Distillation


def test_the_distillation_loss_is_cross_entropy_at_a_temperature() -> None:
    teacher, logits = torch.tensor([[1.0, 3.0], [0.0, 0.0]]), torch.tensor([[2.0, 0.0], [4.0, 0.0]])
    target, logs = (teacher / 2).softmax(1), (logits / 2).log_softmax(1)
    expected = 4 * -(target * logs).sum() / 2
    torch.testing.assert_close(distillation_loss(teacher, logits, 2.0), expected)


def test_a_model_has_nothing_to_learn_from_itself() -> None:
    clip = tiny_clip()
    distillation = Distillation(clip, tiny_reference().captions, temperature=2.0)
    pixels = torch.randn(6, 3, 16, 16)
    distillation(clip.model, pixels).backward()
    gradients = [p.grad for p in clip.model.parameters() if p.grad is not None]
    assert gradients
    assert max(float(g.abs().max()) for g in gradients) < 1e-5
    with torch.no_grad():
        clip.model.get_parameter("visual.proj").mul_(-1)  # the teacher stays what it was
    clip.model.zero_grad()
    distillation(clip.model, pixels).backward()
    assert float(clip.model.get_parameter("visual.proj").grad.abs().max()) > 1e-2  # type: ignore[union-attr]


def distilled(model: Any, teacher: Any, pixels: Tensor, texts: Tensor) -> Tensor:
    """ZSCL's loss at temperature 2, written out."""
    with torch.no_grad():
        text = F.normalize(teacher.encode_text(texts), dim=1)
        target = teacher.logit_scale.exp() * F.normalize(teacher.encode_image(pixels), dim=1)
        p = target @ text.T / 2
    q = model.logit_scale.exp() * F.normalize(model.encode_image(pixels), dim=1) @ text.T / 2
    rows = -(p.softmax(1) * q.log_softmax(1)).sum(1).mean()
    columns = -(p.softmax(0) * q.log_softmax(0)).sum(0).mean()
    return 4 * (rows + columns)


def plain_training(
    model: Any, task: Any, penalty: Any, after_step: Any = lambda step: None
) -> Weights:
    """AdamW on cross-entropy and a penalty, without the trainer."""
    training = TrainingConfig(steps=STEPS, batch_size=16, lr=1e-3)
    clip = tiny_clip()
    seed = task_seed(42, task.name)
    set_seed(seed)
    batches = shuffled_batches(clip.training_set(task), STEPS, 16, seed=seed)
    prompts = tokenize([task.templates[0].format(name) for name in task.classnames])
    parameters = [p for n, p in model.named_parameters() if n != "logit_scale"]
    optimizer = torch.optim.AdamW(parameters, weight_decay=0)
    model.train()
    for step, (pixels, labels) in enumerate(batches):
        rate = learning_rate(step, steps=STEPS, warmup=round(0.1 * STEPS), peak=training.lr)
        optimizer.param_groups[0]["lr"] = rate
        image, text, scale = model(pixels, prompts)
        loss = F.cross_entropy(scale * image @ text.T, labels, label_smoothing=0.2)
        optimizer.zero_grad()
        (loss + penalty(pixels, prompts)).backward()
        optimizer.step()
        after_step(step)
    return copy_weights(model.eval())


def learnt(out: Path, tasks: int, method: str, **changes: Any) -> Weights:
    """What a method's model is after so many tasks."""
    trainer = tiny_trainer(out, methods=[method], **SHORT, **changes)
    trainer.benchmark = trainer.benchmark.subset(tasks)
    trainer.run()
    return load_weights(out / method / "model.safetensors")


def test_lwf_distils_from_the_previous_model_on_the_tasks_own_images(tmp_path: Path) -> None:
    model, teacher = tiny_clip().model, tiny_clip().model
    for count, task in enumerate(tiny_benchmark(), start=1):
        weights = plain_training(model, task, lambda x, t: distilled(model, teacher, x, t))
        found = learnt(tmp_path / f"{count}", count, "lwf")
        assert_trained_alike(found, weights)
        model.load_state_dict(found)  # noise that Adam has made large is not made larger
        teacher.load_state_dict(found)


def test_zscl_distils_from_the_pretrained_model_stays_near_and_averages(tmp_path: Path) -> None:
    model, pretrained = tiny_clip().model, tiny_clip().model
    captions = tokenize(tiny_reference().captions)
    images = tiny_reference().dataset(tiny_clip().test_transform)
    section = {"l2": 0.5, "average_every": 2, "batch_size": 16}
    for count, task in enumerate(tiny_benchmark(), start=1):
        seed = task_seed(42, f"reference of {task.name}")
        references = iter(shuffled_batches(images, STEPS, 16, seed=seed))
        start = {n: p.detach().clone() for n, p in model.named_parameters()}
        kept = [copy_weights(model)]

        def penalty(
            pixels: Tensor, prompts: Tensor, start: Any = start, references: Any = references
        ) -> Tensor:
            far = sum(((p - start[n]) ** 2).sum() for n, p in model.named_parameters())
            return distilled(model, pretrained, next(references), captions) + 0.5 * far

        def keep(step: int, kept: list[Weights] = kept) -> None:
            if step in (1, 3, 4):  # every second, and the last
                kept.append(copy_weights(model))

        plain_training(model, task, penalty, keep)
        average = {n: torch.stack([w[n] for w in kept]).mean(0) for n in kept[0]}
        found = learnt(tmp_path / f"{count}", count, "zscl", zscl=section)
        assert_trained_alike(found, average)
        model.load_state_dict(found)


def test_two_processes_distil_over_the_whole_batch(tmp_path: Path) -> None:
    """The images of a batch answer each text together, wherever they are."""
    methods = ["lwf", "zscl"]
    run_in_two_processes(tmp_path / "together", *methods)
    tiny_trainer(tmp_path / "alone", methods=methods, training={"steps": 2}).run()
    for method in methods:
        alone, together = (
            load_weights(tmp_path / run / method / "model.safetensors")
            for run in ("alone", "together")
        )
        assert_trained_alike(together, alone)


def test_an_average_of_weights_counts_the_start_and_the_last() -> None:
    live = {"w": torch.tensor([0.0])}
    average = WeightAverage(live, every=2, steps=5)
    for step in range(1, 6):
        live["w"].fill_(2.0**step)
        average.after_step(None)  # type: ignore[arg-type]
        if step < 5:
            assert live["w"] == 2.0**step
    assert live["w"].item() == pytest.approx((0 + 2**2 + 2**4 + 2**5) / 4)


# Killed runs


class Killed(BaseException):
    pass


NEW = ["wise_ft", "lwf", "zscl", "rail_primal", "rail_dual", "emr", "task_arithmetic"]


def test_a_run_killed_after_each_file_in_turn_ends_as_an_undisturbed_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    changes: dict[str, Any] = {"methods": NEW, "training": {"steps": 2}}
    tiny_trainer(tmp_path / "undisturbed", **changes).run()
    written = 0

    def count_down(path: Path, write: Any) -> None:
        nonlocal written
        if written == 1:
            raise Killed
        replace(path, write)
        written += 1

    replace = write_text.__globals__["replace"]
    for module in ("weights", "runfolder", "prototypes"):
        monkeypatch.setattr(f"condu.{module}.replace", count_down)
    finished, kills = False, 0
    while not finished and kills < 100:  # each wrote a file
        written = 0
        try:
            tiny_trainer(tmp_path / "killed", **changes).run(resume=True)
            finished = True
        except Killed:
            kills += 1
    assert kills > 20  # configuration, models, adapters, rows and results
    assert outcome(tmp_path / "killed") == outcome(tmp_path / "undisturbed")
    rows = json.loads((tmp_path / "killed" / "progress.json").read_text())["methods"]
    assert list(rows) == NEW


# Options


def test_defaults_are_the_papers() -> None:
    config = RunConfig()
    assert config.wise_ft.weight == 0.8
    assert config.lwf.temperature == config.zscl.temperature == 2
    assert (config.zscl.batch_size, config.zscl.l2, config.zscl.average_every) == (64, 1, 100)
    rail = config.rail
    assert (rail.hidden, rail.ridge, rail.gamma, rail.kernel_ridge) == (15000, 0.1, 0.1, 0.001)
    assert rail.weight == 0.8
    assert demo_config().rail.hidden == 1024


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ({"zscl": {"images": "x"}}, "zscl: images is given but captions is not: both or neither"),
        ({"zscl": {"captions": "x"}}, "zscl: captions is given but images is not"),
        ({"zscl": {"average_every": 0}}, r"zscl\.average_every: .*greater than or equal to 1"),
        ({"lwf": {"temperature": 0}}, r"lwf\.temperature: .*greater than 0, got 0"),
        ({"wise_ft": {"weight": 1.5}}, r"wise_ft\.weight: .*less than or equal to 1, got 1\.5"),
        ({"rail": {"ridges": 1}}, r"unknown key 'rail\.ridges', did you mean 'ridge'\?"),
        ({"task_arithmetic": {"scale": 0}}, r"task_arithmetic\.scale: .*greater than 0"),
    ],
)
def test_wrong_options_are_one_line(section: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        make_config(section)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("method", ["lwf", "zscl", "rail_primal", "rail_dual"])
def test_methods_that_need_a_clip_model_say_so(tmp_path: Path, method: str) -> None:
    trainer = tiny_trainer(tmp_path / "run", methods=[method])
    live: Any = SimpleNamespace(name="mini_vqa", model=trainer.live.model, votes=False)
    trainer.live = live
    with pytest.raises(ConfigError, match=rf"methods: '{method}' .* model.name is 'mini_vqa'"):
        trainer.run()


def test_zscl_without_reference_data_says_what_is_missing(tmp_path: Path) -> None:
    trainer = tiny_trainer(tmp_path / "run", methods=["zscl"])
    trainer.benchmark = dataclasses.replace(trainer.benchmark, reference=None)
    with pytest.raises(ConfigError, match=r"benchmark 'tiny' comes with none: zscl\.images"):
        trainer.run()
    here = {"images": tmp_path / "nowhere", "captions": tmp_path}
    with pytest.raises(ConfigError, match=r"^zscl\.images: there is no image in a folder"):
        tiny_trainer(tmp_path / "other", methods=["zscl"], zscl=here).run()


def test_zscl_reads_the_references_that_it_is_given(tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    references = tiny_reference()
    for number, image in enumerate(references.images):
        image.save(tmp_path / "images" / f"{number:02d}.png")
    (tmp_path / "captions.txt").write_text("\n".join(references.captions))
    given = {"images": tmp_path / "images", "captions": tmp_path / "captions.txt"}
    own = learnt(tmp_path / "own", 1, "zscl")
    assert_near(learnt(tmp_path / "given", 1, "zscl", zscl=given), own, 0)
