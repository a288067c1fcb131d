from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import condu_ext as cx
from condu.fusion import ConDU
from condu.live import canonical_name


class Toy(nn.Module):
    """A parameter of each kind that ConDU treats in its own way."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(4, 6, bias=False)
        self.norm = nn.BatchNorm1d(6)
        self.out = nn.Linear(6, 4)
        self.frozen = nn.Parameter(torch.ones(3), requires_grad=False)
        self.logit_scale = nn.Parameter(torch.tensor(2.0))
        self.register_buffer("scratch", torch.full((2,), -torch.inf), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.logit_scale.exp() * self.out(self.norm(self.embed(x)))


FUSED = {"embed.weight", "norm.weight", "norm.bias", "out.weight", "out.bias"}
PRIVATE = {"norm.running_mean", "norm.running_var"}


@pytest.fixture
def model() -> Toy:
    torch.manual_seed(0)
    return Toy()


def snapshot(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def differing(model: nn.Module, other: dict[str, Tensor]) -> set[str]:
    return {n for n, value in model.state_dict().items() if not torch.equal(value, other[n])}


def finetune(model: nn.Module, seed: int, steps: int = 3) -> dict[str, Tensor]:
    """Train all but logit_scale; BatchNorm statistics, counters and gradients move too."""
    generator = torch.Generator().manual_seed(seed)
    parameters = [
        p for n, p in model.named_parameters() if p.requires_grad and "logit_scale" not in n
    ]
    optimizer = torch.optim.AdamW(parameters, lr=0.05)
    for _ in range(steps):
        optimizer.zero_grad()
        model(torch.randn(8, 4, generator=generator)).square().mean().backward()
        optimizer.step()
    return snapshot(model)


def trained(model: Toy, *tasks: str, **options: Any) -> ConDU:
    fusion = ConDU(model, **options)
    for seed, task in enumerate(tasks):
        finetune(model, seed)
        fusion.absorb(task)
    return fusion


def test_absorb_returns_to_the_pretrained_weights_and_one_expert_is_exact(model: Toy) -> None:
    base = snapshot(model)
    identities = {name: id(p) for name, p in model.named_parameters()}
    fusion = ConDU(model)
    assert fusion.tasks == ()
    finetuned = finetune(model, 1)
    assert differing(model, base) > FUSED | PRIVATE
    fusion.absorb("one")
    assert not differing(model, base)
    assert fusion.tasks == ("one",)
    assert fusion.active is None

    fusion.activate("one")
    assert fusion.active == "one"
    for name in FUSED:
        torch.testing.assert_close(model.state_dict()[name], finetuned[name])
    assert all(torch.equal(model.state_dict()[n], finetuned[n]) for n in PRIVATE)
    assert torch.equal(model.norm.num_batches_tracked, base["norm.num_batches_tracked"])

    fusion.reset()
    assert not differing(model, base)
    assert {name: id(p) for name, p in model.named_parameters()} == identities


def test_what_belongs_to_the_state(model: Toy) -> None:
    fusion = ConDU(model)
    assert set(fusion.pretrained) == FUSED | PRIVATE
    assert set(fusion.state.delta) == FUSED


def test_experts_are_what_the_tensor_level_says(model: Toy) -> None:
    base = {name: value for name, value in snapshot(model).items() if name in FUSED}
    fusion = ConDU(model)
    models = {}
    state = cx.UnifiedDelta.empty(base)
    for seed, task in enumerate("abc"):
        models[task] = finetune(model, seed)
        fusion.absorb(task)
        state = cx.absorb(state, task, {n: models[task][n] for n in FUSED}, base)
    for task in "abc":
        expected = cx.decouple(state, task, base)
        with fusion.expert(task) as live:
            assert live is model
            assert all(torch.equal(live.state_dict()[n], expected[n]) for n in FUSED)
            assert all(torch.equal(live.state_dict()[n], models[task][n]) for n in PRIVATE)


def test_experts_follow_each_other_without_reset(model: Toy) -> None:
    fusion = trained(model, "a", "b")
    with fusion.expert("b"):
        expected = snapshot(model)
    fusion.activate("a")
    fusion.activate("b")
    assert not differing(model, expected)


def test_activate_leaves_nothing_of_what_was_there(model: Toy) -> None:
    fusion = trained(model, "a")
    with fusion.expert("a"):
        expected = snapshot(model)
    finetune(model, 7)
    with torch.no_grad():
        model.logit_scale += 1
    fusion.activate("a")
    assert not differing(model, expected)
    assert all(p.grad is None for p in model.parameters())


def test_include_and_exclude_patterns(model: Toy) -> None:
    fusion = ConDU(model, include=["out.*", "norm.*"], exclude=["*.bias"])
    assert set(fusion.pretrained) == {"norm.weight", "out.weight"} | PRIVATE
    base = snapshot(model)
    finetune(model, 0)
    with pytest.warns(UserWarning, match=r"'a'.*embed\.weight, norm\.bias, out\.bias are lost"):
        fusion.absorb("a")
    assert not differing(model, base)  # excluded, but trainable: back at θ_0 all the same


def test_trained_logit_scale_is_put_back_with_a_warning(model: Toy) -> None:
    fusion = ConDU(model)
    finetune(model, 0)
    with torch.no_grad():
        model.logit_scale += 1
    with pytest.warns(UserWarning, match="logit_scale"):
        fusion.absorb("a")
    assert model.logit_scale == 2.0
    finetune(model, 1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fusion.absorb("b")  # nothing was lost this time


def test_frozen_parameters_are_not_touched(model: Toy) -> None:
    fusion = trained(model, "a")
    with torch.no_grad():
        model.frozen.fill_(7)
    fusion.activate("a")
    fusion.reset()
    assert model.frozen.tolist() == [7, 7, 7]


def test_adapters_are_all_there_is_when_the_rest_is_frozen(model: Toy) -> None:
    model.requires_grad_(False)
    model.out.requires_grad_(True)
    assert set(ConDU(model).state.delta) == {"out.weight", "out.bias"}
    model.requires_grad_(False)
    with pytest.raises(ValueError, match="no trainable"):
        ConDU(model)
    with pytest.raises(ValueError, match=r"include=\['visual\.\*'\]"):
        ConDU(Toy(), include=["visual.*"])
    with pytest.raises(
        TypeError, match=r"exclude must be a list of patterns, got the string 'out'"
    ):
        ConDU(Toy(), exclude="out")


def test_private_patterns_replace_the_default(model: Toy) -> None:
    fusion = ConDU(model, private=["out.*"])
    assert set(fusion.state.delta) == FUSED - {"out.weight", "out.bias"}
    assert not PRIVATE & set(fusion.pretrained)
    finetuned = finetune(model, 0)
    with pytest.warns(UserWarning, match=r"norm\.running_mean, norm\.running_var are lost"):
        fusion.absorb("a")
    finetune(model, 1)
    with pytest.warns(UserWarning, match="running_mean"):
        fusion.absorb("b")
    with fusion.expert("a"):
        assert torch.equal(model.out.weight, finetuned["out.weight"])  # whole, not fused with b


def test_gradients_are_cleared(model: Toy) -> None:
    fusion = ConDU(model)
    finetune(model, 0)
    assert model.out.weight.grad is not None
    fusion.absorb("a")
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("case", ["nan", "used name", "dtype", "shape"])
def test_a_failed_absorb_changes_nothing(case: str, model: Toy) -> None:
    fusion = trained(model, "a")
    state = fusion.state
    before = {n: d.clone() for n, d in state.delta.items()}
    finetune(model, 5)
    if case == "nan":
        with torch.no_grad():
            model.out.weight[0, 0] = torch.nan
    elif case == "dtype":
        model.out.to(torch.bfloat16)
    elif case == "shape":
        model.out.bias = nn.Parameter(torch.zeros(1))
    live = snapshot(model)
    names = "task 'a'|out.weight|out.bias"
    with pytest.raises(ValueError, match=names):
        fusion.absorb("a" if case == "used name" else "b")
    assert all(
        torch.equal(value.nan_to_num(), live[n].nan_to_num())
        for n, value in model.state_dict().items()
    )
    assert fusion.state is state
    assert fusion.tasks == ("a",)
    assert all(torch.equal(state.delta[n], before[n]) for n in before)


def test_expert_restores_after_an_error_and_does_not_nest(model: Toy) -> None:
    fusion = trained(model, "a", "b")
    base = snapshot(model)
    with pytest.raises(ZeroDivisionError), fusion.expert("a"):
        raise ZeroDivisionError
    assert not differing(model, base)
    assert fusion.active is None

    with fusion.expert("a"):
        inside = snapshot(model)
        calls: list[Callable[[], object]] = [
            lambda: fusion.expert("b").__enter__(),
            lambda: fusion.activate("b"),
            fusion.reset,
            lambda: fusion.absorb("c"),
        ]
        for call in calls:
            with pytest.raises(RuntimeError, match="expert 'a'"):
                call()
        assert not differing(model, inside)
        assert fusion.active == "a"
    assert not differing(model, base)

    fusion.activate("a")
    with pytest.raises(RuntimeError, match="'a' is active"), fusion.expert("b"):
        pass
    with pytest.raises(RuntimeError, match="'a' is active"):
        fusion.absorb("c")
    fusion.reset()
    with fusion.expert("b"):  # still usable
        assert fusion.active == "b"


def test_an_unknown_task_leaves_the_weights(model: Toy) -> None:
    fusion = trained(model, "a")
    live = finetune(model, 3)
    with pytest.raises(KeyError, match="nope"):
        fusion.activate("nope")
    assert not differing(model, live)
    assert fusion.active is None


def test_replaced_parameters_and_loaded_weights_are_found_by_name(model: Toy) -> None:
    fusion = ConDU(model)
    base = snapshot(model)
    finetuned = finetune(Toy(), 4)
    model.load_state_dict(finetuned)
    model.out.weight = nn.Parameter(model.out.weight.detach().clone() + 1)
    fusion.absorb("a")
    assert not differing(model, base)
    with fusion.expert("a"):
        torch.testing.assert_close(model.out.weight.detach(), finetuned["out.weight"] + 1)
    del model.out.weight
    with pytest.raises(KeyError, match=r"no longer has tensor 'out\.weight'"):
        fusion.reset()


def test_tied_weights_stay_tied_and_are_counted_once() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed = nn.Embedding(5, 3)
            self.head = nn.Linear(3, 5)
            self.head.weight = self.embed.weight

    def rescaler(fusion: ConDU) -> float:
        return fusion.state.rescaler("a")  # type: ignore[return-value]

    results = []
    for exclude in ((), ("head.weight",)):
        torch.manual_seed(0)
        model = Tied()
        fusion = ConDU(model, exclude=exclude)
        for task in "ab":
            with torch.no_grad():
                model.embed.weight += torch.randn(5, 3)
                model.head.bias += torch.randn(5)
            fusion.absorb(task)
        with fusion.expert("a"):
            assert model.head.weight is model.embed.weight
            results.append((rescaler(fusion), model.head.weight.detach().clone()))
            # the excluded alias must not put θ_0 over the expert
            assert not torch.equal(model.head.weight, fusion.pretrained["embed.weight"])
    assert results[0][0] == results[1][0]
    assert torch.equal(results[0][1], results[1][1])


@pytest.mark.parametrize(
    ("name", "canonical"),
    [
        ("module.visual.conv1.weight", "visual.conv1.weight"),
        ("_orig_mod.module._orig_mod.a.b", "a.b"),
        ("visual._orig_mod.proj", "visual.proj"),
        ("visual.module.proj", "visual.module.proj"),
        ("module", "module"),
    ],
)
def test_canonical_names(name: str, canonical: str) -> None:
    assert canonical_name(name) == canonical


def test_wrapped_and_bare_models_share_a_state(model: Toy, tmp_path: Path) -> None:
    class Wrapper(nn.Module):  # named as DistributedDataParallel names its model
        def __init__(self, module: nn.Module) -> None:
            super().__init__()
            self.module = module

        def forward(self, x: Tensor) -> Tensor:
            return self.module(x)

    compiled: Any = torch.compile(model)
    for wrapped in (Wrapper(model), compiled, Wrapper(compiled)):
        assert set(ConDU(wrapped).pretrained) == FUSED | PRIVATE
    trained(model, "a").save_pretrained(tmp_path / "state")
    model.requires_grad_(False)  # what belongs to the state is not asked of the model
    again = ConDU.from_pretrained(tmp_path / "state", Wrapper(model))
    assert again.tasks == ("a",)
    assert set(again.pretrained) == FUSED | PRIVATE


def test_colliding_canonical_names(model: Toy) -> None:
    both = nn.ModuleDict({"module": nn.ModuleDict({"x": nn.Linear(2, 2)}), "x": nn.Linear(2, 2)})
    with pytest.raises(ValueError, match=r"canonical name 'x\.weight'"):
        ConDU(both)


def test_options_reach_the_state(model: Toy) -> None:
    rule = cx.FusionRule(zero_sum="positive", rescale="tensor_mean")
    state = ConDU(model, rule=rule, state_dtype=torch.bfloat16).state
    assert state.rule == rule
    assert {d.dtype for d in state.delta.values()} == {torch.bfloat16}
    with pytest.raises(ValueError, match="offload must be None or 'cpu', got 'disk'"):
        ConDU(model, offload="disk")  # type: ignore[arg-type]


def test_save_and_load(model: Toy, tmp_path: Path) -> None:
    base = snapshot(model)
    fusion = trained(model, "a", "b")
    fusion.save_pretrained(tmp_path / "state")
    fresh = Toy()
    fresh.load_state_dict(base)
    again = ConDU.from_pretrained(tmp_path / "state", fresh)
    assert again.tasks == ("a", "b")
    assert set(again.pretrained) == FUSED | PRIVATE
    for task in "ab":
        with fusion.expert(task), again.expert(task):
            assert not differing(fresh, snapshot(model))
    for each in (fusion, again):  # and both go on alike
        finetune(each._space.model, 9)
        each.absorb("c")
    with fusion.expert("a"), again.expert("a"):
        assert not differing(fresh, snapshot(model))


def test_an_empty_state_can_be_saved(model: Toy, tmp_path: Path) -> None:
    ConDU(model).save_pretrained(tmp_path / "state")
    again = ConDU.from_pretrained(tmp_path / "state", model)
    assert again.tasks == ()
    assert set(again.pretrained) == FUSED | PRIVATE


def test_loading_refuses_another_base(model: Toy, tmp_path: Path) -> None:
    trained(model, "a").save_pretrained(tmp_path / "state")
    with torch.no_grad():
        model.out.weight[1, 1] += 1e-3
    with pytest.raises(ValueError, match=r"out\.weight"):
        ConDU.from_pretrained(tmp_path / "state", model)
    with pytest.raises(KeyError, match=r"embed\.weight"):
        ConDU.from_pretrained(tmp_path / "state", nn.Linear(6, 4))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("offload", [None, "cpu"])
def test_model_moved_to_the_gpu_after_the_start(model: Toy, offload: Any) -> None:
    fusion = ConDU(model, offload=offload)
    base = snapshot(model)
    model.cuda()
    finetuned = {n: v + 1 for n, v in base.items() if v.is_floating_point()}
    model.load_state_dict({**base, **finetuned})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # logit_scale
        fusion.absorb("a")
    assert not differing(model.cpu(), base)
    model.cuda()
    with fusion.expert("a"):
        for name in FUSED:
            torch.testing.assert_close(model.state_dict()[name].cpu(), finetuned[name])
    expected = "cpu" if offload else "cuda"
    assert {t.device.type for t in fusion.pretrained.values()} == {expected}
    assert {t.device.type for t in fusion.state.delta.values()} == {expected}
