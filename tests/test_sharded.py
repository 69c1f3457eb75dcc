"""fully_shard (FSDP2) before and after fuse(): what runs, what report() says, and what unfuse() restores."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from fusion import expect_paths
from torch import nn
from torchvision.models.resnet import BasicBlock, Bottleneck, ResNet

import fusedres

fsdp = pytest.importorskip("torch.distributed.fsdp")
if not hasattr(fsdp, "fully_shard"):
    pytest.skip("this torch has no fully_shard", allow_module_level=True)


@pytest.fixture
def mesh(tmp_path: Path) -> Iterator[object]:
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield torch.distributed.device_mesh.init_device_mesh("cpu", (1,))
    dist.destroy_process_group()


def model(kind: type = BasicBlock) -> nn.Module:
    torch.manual_seed(0)
    return ResNet(kind, [1, 1, 1, 1], num_classes=3).double()


def sharded(whole: nn.Module, mesh: object) -> nn.Module:
    for block in [child for child in whole.modules() if isinstance(child, BasicBlock | Bottleneck)]:
        fsdp.fully_shard(block, mesh=mesh)
    return fsdp.fully_shard(whole, mesh=mesh)


@pytest.mark.parametrize("before", [True, False], ids=["fuse first", "shard first"])
@pytest.mark.parametrize("kind", [BasicBlock, Bottleneck])
def test_sharded_models_run_fused_and_say_so(kind: type, before: bool, mesh: object) -> None:
    x = torch.randn(2, 3, 32, 32, dtype=torch.float64)
    expected = model(kind)(x)
    if before:
        fused = sharded(fusedres.fuse(model(kind)), mesh)
    else:
        fused = fusedres.fuse(sharded(model(kind), mesh))
    assert all("DTensor: fused where fully_shard gathers it" in row.reason for row in fusedres.report(fused))
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
    plain = sharded(model(), mesh)
    fused = sharded(fusedres.fuse(model()), mesh) if before else fusedres.fuse(sharded(model(), mesh))
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
