"""The checks that each process of test_sharded.py runs; spawned processes import this module by name."""

from __future__ import annotations

import copy
from collections.abc import Callable
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from fusion import expect_paths
from processes import HANG
from reference import randomize
from torch import Tensor, nn
from torch.distributed import fsdp
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict, set_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp.wrap import ModuleWrapPolicy
from torch.nn.parallel import DistributedDataParallel
from torchvision.models.resnet import BasicBlock, Bottleneck, ResNet

import fusedres

Wrap = Callable[[nn.Module], nn.Module]


def main(rank: int, world: int, folder: str) -> None:
    """Join the process group and run every check; an exception in one process fails the test."""
    torch.set_num_threads(1)
    store = Path(folder, "store").as_uri()
    dist.init_process_group("gloo", store, timedelta(seconds=HANG), world_size=world, rank=rank)
    try:
        for name, wrap in WRAPPERS.items():
            training_is_the_stock_models(rank, name, wrap)
            checkpoints_are_the_stock_models(rank, wrap, Path(folder, name.replace(" ", "_")))
    finally:
        dist.destroy_process_group()


def model(kind: type[BasicBlock | Bottleneck] = BasicBlock) -> nn.Module:
    """Return a ResNet of a stem and two blocks."""
    torch.manual_seed(0)
    whole = ResNet(kind, [1, 1, 1, 1])
    whole.layer3, whole.layer4, whole.fc = nn.Identity(), nn.Identity(), nn.Linear(128 * kind.expansion, 3)
    return randomize(whole, 1).double()


def flattened(whole: nn.Module, original: bool) -> nn.Module:
    """Wrap each block and the network in FullyShardedDataParallel, with or without the original parameters."""
    policy = ModuleWrapPolicy({BasicBlock, Bottleneck})
    return fsdp.FullyShardedDataParallel(
        whole, auto_wrap_policy=policy, use_orig_params=original, device_id=torch.device("cpu")
    )


def sharded(whole: nn.Module, mesh: Any = None) -> nn.Module:
    """Apply fully_shard to each block and to the network."""
    mesh = mesh or init_device_mesh("cpu", (dist.get_world_size(),))
    for block in [child for child in whole.modules() if isinstance(child, BasicBlock | Bottleneck)]:
        fsdp.fully_shard(block, mesh=mesh)
    return fsdp.fully_shard(whole, mesh=mesh)


WRAPPERS: dict[str, Wrap] = {
    "DistributedDataParallel": DistributedDataParallel,
    "FullyShardedDataParallel": partial(flattened, original=False),
    "FullyShardedDataParallel, use_orig_params": partial(flattened, original=True),
    "fully_shard": sharded,
}


def batch(rank: int, step: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(10 * step + rank)
    return torch.randn(4, 3, 32, 32, dtype=torch.float64, generator=generator), torch.tensor([0, 1, 2, rank])


def optimizer_of(wrapped: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(wrapped.parameters(), lr=0.01, momentum=0.9)


def train(wrapped: nn.Module, optimizer: torch.optim.Optimizer, rank: int, steps: range) -> list[float]:
    losses = []
    for step in steps:
        x, y = batch(rank, step)
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(wrapped(x), y)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def states(wrapped: nn.Module, optimizer: torch.optim.Optimizer, full: bool) -> dict[str, Any]:
    weights, moments = get_state_dict(wrapped, optimizer, options=StateDictOptions(full_state_dict=full))
    return {"model": weights, "optimizer": moments}


def assert_same(found: Any, expected: Any, path: str) -> None:
    """Compare nested state dicts within float64 rounding."""
    if isinstance(expected, dict):
        assert found.keys() == expected.keys(), (path, found.keys() ^ expected.keys())
        for key, value in expected.items():
            assert_same(found[key], value, f"{path}.{key}")
    elif isinstance(expected, Tensor):
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-10, msg=lambda text: f"{path}: {text}")
    else:
        assert found == expected, path


def training_is_the_stock_models(rank: int, name: str, wrap: Wrap) -> None:
    """Fused before or after it is wrapped, a model trains like the stock one, and report() and unfuse() are right."""
    for kind in (BasicBlock, Bottleneck):
        stock = wrap(model(kind))
        optimizer = optimizer_of(stock)
        losses = train(stock, optimizer, rank, range(3))
        expected = copy.deepcopy(states(stock, optimizer, full=True))  # DistributedDataParallel overwrites buffers
        for before in (True, False):
            context = f"{name} {kind.__name__} fused {'before' if before else 'after'}"
            wrapped = wrap(fusedres.fuse(model(kind))) if before else fusedres.fuse(wrap(model(kind)))
            rows = fusedres.report(wrapped)
            assert len(rows) == 3 and all(row.fused or "fused where it is gathered" in row.reason for row in rows), rows
            optimizer = optimizer_of(wrapped)
            with expect_paths(fused_forward=6, fused_backward=6, stem_forward=3, stem_backward=3):
                found = train(wrapped, optimizer, rank, range(3))
            torch.testing.assert_close(found, losses, rtol=1e-9, atol=1e-10, msg=context)
            assert all(row.fused for row in fusedres.report(wrapped)), fusedres.report(wrapped)
            assert_same(states(wrapped, optimizer, full=True), expected, context)
            fusedres.unfuse(wrapped)
            x, _ = batch(rank, 3)
            with expect_paths(), torch.no_grad():
                torch.testing.assert_close(wrapped.eval()(x), stock.eval()(x), rtol=1e-9, atol=1e-10)


def checkpoints_are_the_stock_models(rank: int, wrap: Wrap, folder: Path) -> None:
    """A distributed checkpoint of a fused model restores a stock one, and the other way round."""
    for first_fused in (True, False):
        maybe = {True: fusedres.fuse, False: lambda stock: stock}
        first = wrap(maybe[first_fused](model()))
        optimizer = optimizer_of(first)
        train(first, optimizer, rank, range(2))
        where = folder / str(first_fused)
        dcp.save(states(first, optimizer, full=False), checkpoint_id=where)
        expected = train(first, optimizer, rank, range(2, 4))

        second = wrap(maybe[not first_fused](randomize(model(), 9)))
        optimizer = optimizer_of(second)
        found = states(second, optimizer, full=False)
        dcp.load(found, checkpoint_id=where)
        set_state_dict(second, optimizer, model_state_dict=found["model"], optim_state_dict=found["optimizer"])
        torch.testing.assert_close(train(second, optimizer, rank, range(2, 4)), expected, rtol=1e-9, atol=1e-10)

        alone = model() if first_fused else fusedres.fuse(model())  # without a wrapper
        weights = {"model": alone.state_dict()}
        dcp.load(weights, checkpoint_id=where)
        alone.load_state_dict(weights["model"])
        x, _ = batch(0, 9)
        again = wrap(model())
        found = states(again, optimizer_of(again), full=False)
        dcp.load(found, checkpoint_id=where)
        set_state_dict(again, [], model_state_dict=found["model"], optim_state_dict={})
        with torch.no_grad():
            torch.testing.assert_close(alone.eval()(x), again.eval()(x), rtol=1e-9, atol=1e-10)
