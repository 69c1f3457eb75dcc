"""The checks that each process of test_distributed.py runs; spawned processes import this module by name."""

from __future__ import annotations

import copy
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from fusion import fused_twin, stock_case
from processes import HANG
from reference import build, inputs
from shapes import CORE
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import fusedres


def main(rank: int, world: int, folder: str) -> None:
    """Join the process group and run every check; an exception in one process fails the test."""
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=Path(folder, "store").as_uri(),
        rank=rank,
        world_size=world,
        timeout=timedelta(seconds=HANG),
    )
    try:
        for check in CHECKS:
            check(rank)
            dist.barrier()
    finally:
        dist.destroy_process_group()


def assert_close(mine: nn.Module, stock: nn.Module, context: object) -> None:
    for name, parameter in stock.named_parameters():
        grad = mine.get_parameter(name).grad
        assert grad is not None and parameter.grad is not None, name
        torch.testing.assert_close(grad, parameter.grad, rtol=1e-9, atol=1e-9, msg=f"{context}: grad of {name}")
    for name, buffer in stock.named_buffers():
        torch.testing.assert_close(mine.get_buffer(name), buffer, rtol=1e-9, atol=1e-9, msg=f"{context}: {name}")


def two_forwards_then_backward(rank: int) -> None:
    """Gradients and statistics are the stock model's, with and without the broadcast of buffers, and in eval mode."""
    for case in CORE:
        for broadcast in (True, False):
            for mode in ("train", "eval"):
                block, x, grad = stock_case(case, torch.float64, mode=mode)
                models = [fused_twin(block), block]
                for model in models:
                    wrapped = DistributedDataParallel(model, broadcast_buffers=broadcast)
                    out = wrapped(x + rank) * grad + wrapped(x * 2 - rank) * grad
                    out.sum().backward()
                assert_close(*models, f"{case} {mode} broadcast={broadcast}")


def gradients_are_averaged(rank: int) -> None:
    """With different batches in each process, bucket views and static graphs, all processes get the same weights."""
    for options in ({}, {"gradient_as_bucket_view": True}, {"static_graph": True}):
        block, x, grad = stock_case(CORE[1], torch.float64)
        twin = fused_twin(block)
        for model in (twin, block):
            wrapped = DistributedDataParallel(model, **options)
            optimizer = torch.optim.SGD(wrapped.parameters(), lr=0.01)
            for step in range(3):
                optimizer.zero_grad()
                wrapped(x * (1 + rank + step)).backward(grad)
                optimizer.step()
        weight = twin.conv1.weight.detach().clone()
        other = weight.clone()
        dist.broadcast(other, 0)
        assert torch.equal(weight, other)
        torch.testing.assert_close(weight, block.conv1.weight.detach(), rtol=1e-9, atol=1e-10)


def uneven_batches(rank: int) -> None:
    """Each process has another batch size."""
    block, x, grad = stock_case(CORE[4], torch.float64)
    share = slice(0, 3) if rank == 0 else slice(0, 2)
    models = [fused_twin(block), block]
    for model in models:
        DistributedDataParallel(model)(x[share]).backward(grad[share])
    assert_close(*models, "uneven")


def synchronised_batch_norms(rank: int) -> None:
    """After fuse() and convert_sync_batchnorm() the block runs unfused and does what the stock block does."""
    stock = build(CORE[1])
    twin = nn.SyncBatchNorm.convert_sync_batchnorm(fused_twin(copy.deepcopy(stock)))
    stock = nn.SyncBatchNorm.convert_sync_batchnorm(stock)
    assert "SyncBatchNorm" in fusedres.report(twin)[0].reason
    x, _ = inputs(CORE[1])
    x = x[: 2 + rank]
    errors: list[str] = []
    for model in (twin, stock):
        try:
            model(x)
        except ValueError as error:  # torch's SyncBatchNorm trains on accelerators only
            errors.append(str(error))
    assert len(errors) in (0, 2)
    assert len(set(errors)) <= 1
    assert torch.equal(twin.eval()(x), stock.eval()(x))


CHECKS: tuple[Callable[[int], None], ...] = (
    two_forwards_then_backward,
    gradients_are_averaged,
    uneven_batches,
    synchronised_batch_norms,
)
