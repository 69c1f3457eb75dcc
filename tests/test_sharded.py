"""Models whose parameters are sharded or copied: what runs, what report() says, and what unfuse() restores."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import sharded_worker
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from fusion import expect_paths
from reference import randomize, run
from torch import Tensor, nn
from torchvision.models.resnet import BasicBlock, Bottleneck, ResNet

import fusedres

replicate = importlib.import_module("torch.nn.parallel.replicate")  # as an attribute, it is the function
fsdp = pytest.importorskip("torch.distributed.fsdp")


@pytest.fixture
def mesh(tmp_path: Path) -> Iterator[object]:
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield torch.distributed.device_mesh.init_device_mesh("cpu", (1,))
    dist.destroy_process_group()


def model(kind: type = BasicBlock) -> nn.Module:
    torch.manual_seed(0)
    return ResNet(kind, [1, 1, 1, 1], num_classes=3).double()


def test_two_processes(tmp_path: Path) -> None:
    """DDP, FSDP in both modes and fully_shard train like stock models; their distributed checkpoints fit both."""
    mp.spawn(sharded_worker.main, args=(2, str(tmp_path)), nprocs=2)


@pytest.mark.parametrize("before", [True, False], ids=["fuse first", "shard first"])
@pytest.mark.parametrize("kind", [BasicBlock, Bottleneck])
def test_sharded_models_run_fused_and_say_so(kind: type, before: bool, mesh: object) -> None:
    x = torch.randn(2, 3, 32, 32, dtype=torch.float64)
    expected = model(kind)(x)
    if before:
        fused = sharded_worker.sharded(fusedres.fuse(model(kind)), mesh)
    else:
        fused = fusedres.fuse(sharded_worker.sharded(model(kind), mesh))
    assert all("DTensor: fused where it is gathered" in row.reason for row in fusedres.report(fused))
    with expect_paths(stem_forward=1, stem_backward=1, fused_forward=4, fused_backward=4):
        out = fused(x)
        out.square().sum().backward()
    torch.testing.assert_close(out, expected, rtol=1e-9, atol=1e-9)
    rows = fusedres.report(fused)
    assert len(rows) == 5 and all(row.fused and not row.reason for row in rows), rows
    assert all(p.grad is not None for p in fused.parameters())
    fused.layer1[0].bn1.register_forward_hook(lambda *_: None)  # type: ignore[index, union-attr]
    assert "hook on bn1" in {row.name: row.reason for row in fusedres.report(fused)}["layer1.0"]


@pytest.mark.parametrize("before", [True, False], ids=["fuse first", "shard first"])
def test_unfuse_undoes_both(before: bool, mesh: object) -> None:
    plain = sharded_worker.sharded(model(), mesh)
    fused = (
        sharded_worker.sharded(fusedres.fuse(model()), mesh)
        if before
        else fusedres.fuse(sharded_worker.sharded(model(), mesh))
    )
    assert isinstance(fused.layer1[0], fusedres.FusedBasicBlock) and isinstance(fused, fusedres.FusedResNet)  # type: ignore[index, union-attr]
    fusedres.unfuse(fused)
    for child, twin in zip(fused.modules(), plain.modules(), strict=True):
        assert not isinstance(child, fusedres.FusedBasicBlock | fusedres.FusedResNet)
        assert isinstance(child, fsdp.FSDPModule) == isinstance(twin, fsdp.FSDPModule)
        assert type(child).__name__ == type(twin).__name__
    x = torch.randn(2, 3, 32, 32, dtype=torch.float64)
    with expect_paths():
        torch.testing.assert_close(fused(x), plain(x), rtol=1e-9, atol=1e-9)
    assert all("not selected" in row.reason for row in fusedres.report(fused))
    fusedres.fuse(fused)
    with expect_paths(stem_forward=1, fused_forward=4):
        fused(x)


def copies(tensors: list[Tensor], devices: list[int], detach: bool = False) -> list[list[Tensor]]:
    """What DataParallel's broadcast returns, on the CPU: with the gradient's path back to the parameters."""
    return [[(tensor.detach() if detach else tensor).clone() for tensor in tensors] for _ in devices]


@pytest.mark.parametrize("memory", ["auto", "min"])
def test_replicas_of_data_parallel_run_fused(monkeypatch: pytest.MonkeyPatch, memory: str) -> None:
    """In a replica, the parameters are plain attributes of the modules, and not leaves."""
    monkeypatch.setattr(replicate, "_broadcast_coalesced_reshape", copies)
    monkeypatch.setattr(replicate, "_get_device_index", lambda device, optional: device)
    stock, x = randomize(model(), 1), torch.randn(4, 3, 32, 32, dtype=torch.float64)
    whole = fusedres.fuse(randomize(model(), 1), memory=memory)
    for _ in range(2):  # the second time, nothing of the first replicas may be used again
        results = []
        for network in (stock, whole):
            network.zero_grad()
            first, second = replicate.replicate(network, [0, 1])
            assert not list(first.parameters())
            with ThreadPoolExecutor(2) as pool:
                outputs = list(pool.map(lambda replica, share: replica(share), (first, second), x.split(2)))
            torch.cat(outputs).square().sum().backward()
            results.append((torch.cat(outputs), [p.grad for p in network.parameters()]))
            if network is whole:
                assert all(row.fused for row in fusedres.report(first))
        torch.testing.assert_close(results[0], results[1], rtol=1e-9, atol=1e-9)
        with torch.no_grad():
            for parameter, twin in zip(stock.parameters(), whole.parameters(), strict=True):
                parameter -= 1e-3 * parameter.grad  # type: ignore[operator]
                twin.copy_(parameter)


def test_a_computed_weight_is_used_and_gets_its_gradient() -> None:
    """A plain attribute of a convolution or a norm is what Python finds, as in the stock block."""
    results = []
    for fused in (False, True):
        torch.manual_seed(0)
        block = randomize(BasicBlock(4, 4), 1).double()
        if fused:
            fusedres.fuse(block)
        source = torch.randn(4, 4, 3, 3, dtype=torch.float64, requires_grad=True)
        gain = torch.rand(4, dtype=torch.float64, requires_grad=True)
        del block.conv1.weight, block.bn2.weight, block.bn1.running_mean
        block.conv1.weight, block.bn2.weight = source.tanh(), gain.exp()
        block.bn1.running_mean = torch.zeros(4, dtype=torch.float64)
        x, grad = torch.randn(2, 4, 6, 5, dtype=torch.float64), torch.randn(2, 4, 6, 5, dtype=torch.float64)
        with expect_paths(**({"fused_forward": 1, "fused_backward": 1} if fused else {})):
            found = run(block, x, grad)
        results.append(found | {"source": source.grad, "gain": gain.grad, "mean": block.bn1.running_mean})
    assert results[0].keys() == results[1].keys()
    for name, value in results[0].items():
        torch.testing.assert_close(results[1][name], value, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(
    ("name", "value", "reason"),
    [
        ("conv1.weight", 3.0, "conv1.weight is a float"),
        ("bn1.bias", [1.0], "bn1.bias is a list"),
        ("bn1.running_var", torch.ones(2, 2), "bn1.running_var is not a contiguous vector"),
        ("conv1.bias", torch.ones(4), "conv1 has a bias"),
    ],
)
def test_other_attributes_are_a_reason(name: str, value: object, reason: str) -> None:
    block = fusedres.fuse(BasicBlock(4, 4))
    owner, _, field = name.partition(".")
    if field in dict(getattr(block, owner).named_parameters()) | dict(getattr(block, owner).named_buffers()):
        delattr(getattr(block, owner), field)
    getattr(block, owner).__dict__[field] = value
    (row,) = fusedres.report(block)
    assert not row.fused and reason in row.reason
