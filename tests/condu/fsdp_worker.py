"""One of the processes of test_fsdp.py: ConDU of a sharded module, beside one of a whole one."""

from __future__ import annotations

import warnings
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from condu import ConDU


class Toy(nn.Module):
    """Uneven and empty shards, a tie, a buffer, a frozen and an excluded parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(4, 7)
        self.norm = nn.BatchNorm1d(7)
        self.second = nn.Linear(7, 7, bias=False)
        self.head = nn.Linear(7, 1)
        self.offset = self.head.bias  # one element: the second process has none
        self.logit_scale = nn.Parameter(torch.ones(1))
        self.frozen = nn.Parameter(torch.ones(3), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.second(self.norm(self.first(x)).relu())
        return self.logit_scale.exp() * (self.head(hidden) + self.offset)


def sharded_toy() -> Toy:
    torch.manual_seed(0)
    model = Toy()
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for part in (model.first, model.second, model):  # norm, head and the rest are the root's
        fully_shard(part, mesh=mesh)
    return model


def whole_toy() -> Toy:
    torch.manual_seed(0)
    return Toy()


def whole(model: nn.Module) -> dict[str, Tensor]:
    """Copies of all weights of a module, whole."""
    return {
        name: (t.full_tensor() if isinstance(t, DTensor) else t).detach().clone()
        for name, t in model.state_dict().items()
    }


def finetune(model: nn.Module, seed: int) -> None:
    """All but the excluded parameter move; every process sees the same data."""
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(
        [p for n, p in model.named_parameters() if n != "logit_scale" and p.requires_grad],
        lr=0.05,
    )
    for _ in range(2):
        optimizer.zero_grad()
        model(torch.randn(8, 4, generator=generator)).square().mean().backward()
        optimizer.step()


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor), name


def fuse(rank: int, world: int, folder: Path) -> None:
    dist.init_process_group(
        "gloo",
        store=dist.FileStore(str(folder / "store"), world),
        rank=rank,
        world_size=world,
        timeout=timedelta(seconds=60),
    )
    torch.set_num_threads(1)
    warnings.simplefilter("error", UserWarning)
    model, twin = sharded_toy(), whole_toy()
    identities = {name: id(p) for name, p in model.named_parameters()}
    base = whole(model)
    fusion, expected = ConDU(model), ConDU(twin)
    for seed, task in enumerate(("cars", "food")):
        finetune(model, seed)
        twin.load_state_dict(whole(model))
        fusion.absorb(task)
        expected.absorb(task)
        assert_same(whole(model), base)
        same_sums(expected, fusion)
    assert {name: id(p) for name, p in model.named_parameters()} == identities
    check_experts(fusion, model, expected, twin, base)

    fusion.save_pretrained(folder / "fused")
    read = sharded_toy()
    again = ConDU.from_pretrained(folder / "fused", read)
    check_experts(again, read, expected, twin, base)
    assert ConDU.from_pretrained(folder / "fused", whole_toy()).tasks == fusion.tasks

    with pytest.raises(ValueError, match="already in the state"):
        fusion.absorb("cars")
    with torch.no_grad():
        if rank == world - 1:
            model.first.weight.to_local()[0, 0] = torch.nan
    with pytest.raises(ValueError, match=r"task 'third', tensor 'first.weight'.*NaN"):
        fusion.absorb("third")
    fusion.reset()
    assert_same(whole(model), base)
    other = sharded_toy()
    with torch.no_grad():
        if rank == world - 1:
            other.first.weight.to_local()[0, 0] += 1
    with pytest.raises(ValueError, match=r"'first.weight': differs from the base"):
        ConDU.from_pretrained(folder / "fused", other)
    what_one_process_meets(fusion, model, rank == world - 1, folder)
    fuse_adapters(rank, world, folder / "adapters")
    dist.destroy_process_group()


def what_one_process_meets(fusion: ConDU, model: Toy, last: bool, folder: Path) -> None:
    """Errors and changes that one process alone can see reach the others."""
    known = fusion.tasks

    def broken(*_: object) -> None:
        raise MemoryError("not enough memory")

    for call in (
        lambda: fusion.absorb("third"),
        lambda: fusion.activate("cars"),
        lambda: fusion.check_new_task("third"),
        fusion.moved,
    ):
        with pytest.MonkeyPatch.context() as patch:
            if last:
                patch.setattr(fusion, "_live", broken)
            with pytest.raises(MemoryError, match="not enough memory"):
                call()
    assert fusion.tasks == known
    place = folder / ("elsewhere" if last else "fused")
    with pytest.raises(FileNotFoundError, match="elsewhere"):
        ConDU.from_pretrained(place, sharded_toy())

    fusion.reset()
    assert fusion.moved() == ()
    with torch.no_grad():
        model.logit_scale.to_local().add_(1)  # its one element is the first process's
        if last:
            model.first.weight.to_local()[0, 0] += 1
    assert set(fusion.moved()) == {"first.weight", "logit_scale"}
    with pytest.warns(UserWarning, match=r"changes of logit_scale are lost"):
        fusion.absorb("third")


def lora_toy(sharded: bool) -> nn.Module:
    """A fresh adapter over a frozen model, sharded with it."""
    torch.manual_seed(0)
    layers = nn.Sequential(nn.Linear(4, 7), nn.ReLU(), nn.Linear(7, 3))
    model = get_peft_model(layers, LoraConfig(r=2, target_modules=["0", "2"]))
    if sharded:
        fully_shard(model, mesh=init_device_mesh("cpu", (dist.get_world_size(),)))
    return model


def fuse_adapters(rank: int, world: int, folder: Path) -> None:
    """Factors of LoRA over sharded weights, whose fingerprint is that of the whole ones."""
    model, twin = lora_toy(sharded=True), lora_toy(sharded=False)
    fusion, expected = ConDU(model), ConDU(twin)
    for seed, task in enumerate(("cars", "food")):
        finetune(model, seed)
        twin.load_state_dict(whole(model))
        fusion.absorb(task)
        expected.absorb(task)
        same_sums(expected, fusion)
    fusion.save_pretrained(folder)
    expected.save_pretrained(folder.with_name(f"adapters-{rank}"))
    assert fusion.state.base_fingerprints == expected.state.base_fingerprints
    for read in (lora_toy(sharded=True), lora_toy(sharded=False)):
        again = ConDU.from_pretrained(folder, read)
        with again.expert("cars"), expected.expert("cars"):
            assert_same(whole(read), whole(twin))
    other = lora_toy(sharded=True)
    with torch.no_grad():
        frozen = other.get_parameter("base_model.model.2.base_layer.weight")
        if rank == world - 1:
            frozen.to_local()[0, 0] += 1
    with pytest.raises(ValueError, match=r"the weights under the adapter.* differ"):
        ConDU.from_pretrained(folder, other)
    with pytest.raises(TypeError, match=r"the product space, tensor '.*': is sharded"):
        ConDU(lora_toy(sharded=True), space="product")


def check_experts(
    fusion: ConDU, model: Toy, expected: ConDU, twin: Toy, base: dict[str, Tensor]
) -> None:
    """Weights and answers are one process's, and θ_0 is back after an evaluation, which leaves
    modules of FSDP2 with whole parameters."""
    inputs = torch.randn(5, 4, generator=torch.Generator().manual_seed(9))
    assert fusion.tasks == expected.tasks
    for task in expected.tasks:
        with fusion.expert(task), expected.expert(task), torch.no_grad():
            assert_same(whole(model), whole(twin))
            torch.testing.assert_close(model.eval()(inputs), twin.eval()(inputs))
        model.train()
        assert_same(whole(model), base)


def same_sums(target: ConDU, source: ConDU) -> None:
    """Rescalers may differ in the last bits: go on from the same ones."""
    (mine,), (theirs,) = target.state.arenas, source.state.arenas
    torch.testing.assert_close(mine.rescaler, theirs.rescaler, rtol=2**-21, atol=0)
    mine.num, mine.den, mine.rescaler = theirs.num, theirs.den, theirs.rescaler.clone()
