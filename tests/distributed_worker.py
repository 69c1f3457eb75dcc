"""The checks that each process of test_distributed.py runs; spawned processes import this module by name."""

from __future__ import annotations

import copy
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from fusion import BACKENDS, FORMATS, MEMORY, expect_paths, fused_twin, stock_case
from processes import HANG
from reference import Values, randomize, run
from shapes import CORE, Case
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torchvision.models.resnet import BasicBlock, ResNet

import fusedres
from fusedres.modules.choice import unverified


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


def shares(batch: int, first: int) -> tuple[slice, slice]:
    """Return what two processes take of a batch."""
    return slice(0, first), slice(first, batch)


def synchronised(model: nn.Module, x: Tensor, grad: Tensor, share: slice) -> Values:
    """Run one process's share; add up the parameters' gradients of all processes."""
    found = run(model, x[share], grad[share])
    for name, value in found.items():
        if name.startswith("grad."):
            dist.all_reduce(value)
    return found


def expect_whole(found: Values, whole: Values, share: slice, context: str) -> None:
    """Assert that a process has its share of what one process computes from the whole batch."""
    assert found.keys() == whole.keys()
    for name, value in found.items():
        expected = whole[name][share] if name in ("out", "grad_x") else whole[name]
        torch.testing.assert_close(
            value, expected, rtol=1e-9, atol=1e-11, msg=lambda text, name=name: f"{context}: {name}: {text}"
        )


def synchronised_blocks(rank: int) -> None:
    """Two processes with SyncBatchNorm compute what one process with the whole batch does, however it is divided."""
    for case in CORE:
        block, x, grad = stock_case(case, torch.float64)
        whole = run(copy.deepcopy(block), x, grad)
        for memory in MEMORY:
            for first in (1, 2, 3):  # with 3, the other process has no image
                share = shares(len(x), first)[rank]
                twin = nn.SyncBatchNorm.convert_sync_batchnorm(fused_twin(block, memory))
                assert fusedres.report(twin)[0].fused
                with expect_paths(fused_forward=1, fused_backward=1):
                    found = synchronised(twin, x, grad, share)
                expect_whole(found, whole, share, f"{case} {memory} {first}")


def synchronised_before_fuse(rank: int) -> None:
    """Converted before fuse(), on every backend (Triton's in its interpreter), in NCHW and channels_last."""
    for case in CORE:
        block, x, grad = stock_case(case, torch.float64)
        whole = run(copy.deepcopy(block), x, grad)
        share = shares(len(x), 2)[rank]
        for backend in (*BACKENDS, "triton") if case.shortcut == "projection" else BACKENDS:
            for memory_format in FORMATS:
                converted = nn.SyncBatchNorm.convert_sync_batchnorm(fused_twin(block))
                twin = fusedres.fuse(fusedres.unfuse(converted), conv="fused")
                with fusedres.use_backend(backend):
                    found = synchronised(twin, x.to(memory_format=memory_format), grad, share)
                expect_whole(found, whole, share, f"{case} {backend}")


def synchronised_one_pass(rank: int) -> None:
    """The statistics of a projection and of the last convolution come from their inputs (memory="min")."""
    case = Case("bottleneck", "projection", 4, 2, 1, batch=4, height=9, width=8)
    block, x, grad = stock_case(case, torch.float64)
    x += torch.linspace(50, 90, 4, dtype=torch.float64).view(1, -1, 1, 1)  # far from zero, so that pivots matter
    whole = run(copy.deepcopy(block), x, grad)
    for first in (1, 3, 4):
        share = shares(len(x), first)[rank]
        twin = nn.SyncBatchNorm.convert_sync_batchnorm(fused_twin(block, "min"))
        expect_whole(synchronised(twin, x, grad, share), whole, share, f"one pass {first}")


def synchronised_with_constant_norms(rank: int) -> None:
    """Only norms in training mode exchange anything."""
    for case in (CORE[1], CORE[4]):
        for name in case.norms:
            block, x, grad = stock_case(case, torch.float64, mode=f"frozen:{name}")
            whole = run(copy.deepcopy(block), x, grad)
            share = shares(len(x), 2)[rank]
            for memory in MEMORY:
                twin = nn.SyncBatchNorm.convert_sync_batchnorm(fused_twin(block, memory))
                expect_whole(synchronised(twin, x, grad, share), whole, share, f"{case} without {name}")


def synchronised_options(rank: int) -> None:
    """momentum=None, no affine map, no statistics; and a group of this process alone, which exchanges nothing."""
    case = CORE[1]
    alone = [dist.new_group([each]) for each in range(2)][rank]
    for options in ({"momentum": None}, {"affine": False}, {"track_running_stats": False}):
        for memory in MEMORY:
            block, x, grad = stock_case(case, torch.float64)
            for name in case.norms:
                old = block.get_submodule(name)
                block.set_submodule(name, nn.BatchNorm2d(old.num_features, **options).double())
            whole = run(copy.deepcopy(block), x, grad)
            share = shares(len(x), 1)[rank]
            twin = nn.SyncBatchNorm.convert_sync_batchnorm(fused_twin(block, memory))
            expect_whole(synchronised(twin, x, grad, share), whole, share, f"{options}")
    block, x, grad = stock_case(case, torch.float64)
    twin = nn.SyncBatchNorm.convert_sync_batchnorm(fused_twin(block), process_group=alone)
    expected, found = run(block, x + rank, grad), run(twin, x + rank, grad)
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-9, atol=1e-11)


def synchronised_network(rank: int) -> None:
    """A whole ResNet with its stem, in DistributedDataParallel, which averages the gradients."""
    torch.manual_seed(0)  # the classifier of both processes
    model = randomize(ResNet(BasicBlock, [1, 1, 1, 1], num_classes=5), 3).double()
    x = torch.randn(4, 3, 64, 64, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    grad = torch.randn(4, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    whole = run(copy.deepcopy(model), x, grad)
    share = shares(4, 1)[rank]
    twin = nn.SyncBatchNorm.convert_sync_batchnorm(fusedres.fuse(copy.deepcopy(model)))
    assert all(row.fused for row in fusedres.report(twin))
    with expect_paths(fused_forward=4, fused_backward=4, stem_forward=1, stem_backward=1):
        expect_whole(synchronised(copy.deepcopy(twin), x, grad, share), whole, share, "network")
    wrapped = DistributedDataParallel(fusedres.fuse(copy.deepcopy(model)))  # refuses SyncBatchNorm on a CPU
    twin = wrapped.module = nn.SyncBatchNorm.convert_sync_batchnorm(wrapped.module)
    wrapped(x[share]).backward(grad[share])
    for name, parameter in twin.named_parameters():
        torch.testing.assert_close(2 * parameter.grad, whole[f"grad.{name}"], rtol=1e-9, atol=1e-11)
    stock = fusedres.unfuse(copy.deepcopy(twin)).eval()
    torch.testing.assert_close(twin.eval()(x), stock(x), rtol=1e-9, atol=1e-11)


def synchronised_in_half_precision(rank: int) -> None:
    """Under autocast, the errors are like those of one process with the whole batch."""
    block, x, grad = stock_case(CORE[4], torch.float32)
    exact = run(copy.deepcopy(block).double(), x.double(), grad.double())
    share = shares(len(x), 1)[rank]
    for dtype in (torch.bfloat16, torch.float16):
        whole = run(copy.deepcopy(block), x, grad, dtype)
        twin = nn.SyncBatchNorm.convert_sync_batchnorm(fused_twin(block))
        found = run(twin, x[share], grad[share], dtype)
        for name in ("out", "grad_x"):
            error = (found[name].double() - exact[name][share]).norm()
            allowed = (whole[name].double() - exact[name]).norm()
            assert found[name].dtype is whole[name].dtype and error <= 1.5 * allowed, (dtype, name, error, allowed)


def synchronised_second_derivatives(rank: int) -> None:
    """There are none, as in torch."""
    block, x, grad = stock_case(CORE[0], torch.float64)
    twin = nn.SyncBatchNorm.convert_sync_batchnorm(fused_twin(block))
    out = twin(x.requires_grad_())
    with pytest.raises(RuntimeError, match="synchronised BatchNorm"):
        torch.autograd.grad(out, x, grad, create_graph=True)


def synchronised_on_gpus(rank: int) -> None:
    """No GPU has run this yet, so it is not a default there."""
    block, _, _ = stock_case(CORE[0])
    twin = nn.SyncBatchNorm.convert_sync_batchnorm(fused_twin(block))
    gpu = torch.device("cuda")
    assert "has not yet run fused on a GPU" in str(unverified(twin.anatomy(), gpu, "auto", "auto"))
    assert unverified(twin.anatomy(), gpu, "library", "auto") is None
    assert unverified(twin.anatomy(), torch.device("cpu"), "auto", "auto") is None
    assert unverified(fused_twin(block).anatomy(), gpu, "auto", "auto") is None


CHECKS: tuple[Callable[[int], None], ...] = (
    two_forwards_then_backward,
    gradients_are_averaged,
    uneven_batches,
    synchronised_blocks,
    synchronised_before_fuse,
    synchronised_one_pass,
    synchronised_with_constant_norms,
    synchronised_options,
    synchronised_network,
    synchronised_in_half_precision,
    synchronised_second_derivatives,
    synchronised_on_gpus,
)
