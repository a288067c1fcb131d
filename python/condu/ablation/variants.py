"""Which variants of ConDU are compared: data, each the default with one thing changed."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Literal, get_args

from condu.ablation.fusing import Fusing, Sign, Value
from condu.voting import SemanticVoting, Space, Weights
from condu_ext.rule import Rescale, ZeroSum

PrototypeKind = Literal["both", "images", "text", "unnormalised", "experts"]
"""What images are compared with when they vote.

- ``"both"``: of each class the mean normalised image feature and the mean normalised text feature
  of the pretrained model (the authors' code, see `condu.prototypes`).
- ``"images"``, ``"text"``: one of the two alone.
- ``"unnormalised"``: both, with features as the pretrained model gives them (the paper's formula by
  the letter).
- ``"experts"``: as ``"both"``, but of each task under its own expert, and the image that votes is
  encoded by each expert too.
"""


@dataclass(frozen=True)
class Variant:
    """One line of the table. With ``half`` the pretrained and the fine-tuned models are those that
    a checkpoint in bfloat16 would hold."""

    group: str
    name: str
    fusing: Fusing
    voting: SemanticVoting
    prototypes: PrototypeKind = "both"
    half: bool = False


def variants(default: Variant, tasks: int) -> list[Variant]:
    """The default and all variants of it over so many tasks; those that would be the default again
    are left out."""
    return [default, *_fusing(default), *_half(default), *_voting(default, tasks), *_sets(default)]


def _fusing(default: Variant) -> Iterator[Variant]:
    signs: dict[Sign, str] = {"majority": "sign of the majority", "random": "sign of a random task"}
    values: dict[Value, str] = {
        "agreeing_mean": "mean of those that agree",
        "mean": "mean of all",
    }
    changed = {"no masks": replace(default.fusing, masks=False)}
    changed["no rescaler"] = replace(default.fusing, rescale="none")
    for kind in get_args(Rescale):
        changed[f"rescaler {kind}"] = replace(default.fusing, rescale=kind)
    for sign, name in signs.items():
        changed[name] = replace(default.fusing, sign=sign)
    for value, name in values.items():
        changed[name] = replace(default.fusing, value=value)
    for name, fusing in changed.items():
        if fusing != default.fusing:
            yield replace(default, group="fusion", name=name, fusing=fusing)


def _half(default: Variant) -> Iterator[Variant]:
    for kind in get_args(ZeroSum):
        fusing = replace(default.fusing, zero_sum=kind)
        name = f"bfloat16, ties {kind}"
        yield replace(default, group="16-bit checkpoints", name=name, fusing=fusing, half=True)


def _voting(default: Variant, tasks: int) -> Iterator[Variant]:
    voting = default.voting
    changed = {f"K = {k}": replace(voting, k=k) for k in range(1, tasks + 1)}
    if voting.k >= tasks:  # as many experts as there are, as with K = tasks
        del changed[f"K = {tasks}"]
    for weights in get_args(Weights):
        changed[f"weights {weights}"] = replace(voting, weights=weights)
    pretrained = not voting.include_pretrained
    name = f"{'with' if pretrained else 'without'} the pretrained model"
    changed[name] = replace(voting, include_pretrained=pretrained)
    for space in get_args(Space):
        changed[f"mean of {space}"] = replace(voting, space=space)
    for name, other in changed.items():
        if other != voting:
            yield replace(default, group="voting", name=name, voting=other)


def _sets(default: Variant) -> Iterator[Variant]:
    names: dict[PrototypeKind, str] = {
        "images": "images only",
        "text": "text only",
        "unnormalised": "features not normalised",
        "experts": "of each expert",
    }
    for kind, name in names.items():
        yield replace(default, group="prototypes", name=name, prototypes=kind)
