"""FrozenBatchNorm2d, whose statistics and affine map are buffers: fused forward and backward as constants."""

from __future__ import annotations

import copy

import pytest
import torch
from fusion import BACKENDS, FORMATS, MEMORY, expect_paths, label
from reference import Values, randomize, run
from shapes import CORE, Case
from tolerance import check_model
from torch import Tensor, nn
from torchvision.models.detection.backbone_utils import resnet_fpn_backbone
from torchvision.models.resnet import BasicBlock, Bottleneck, ResNet
from torchvision.ops import FrozenBatchNorm2d
from torchvision.ops.misc import FrozenBatchNorm2d as Original

import fusedres


class CopiedFrozenBatchNorm2d(nn.Module):
    """A copy as other packages have it: buffers without num_batches_tracked, no eps attribute."""

    def __init__(self, n: int) -> None:
        super().__init__()
        for name, value in (("weight", 1.0), ("bias", 0.0), ("running_mean", 0.0), ("running_var", 1.0)):
            self.register_buffer(name, torch.full((n,), value))

    def forward(self, x: Tensor) -> Tensor:
        weight, bias, mean, var = (b.reshape(1, -1, 1, 1) for b in self.buffers())
        scale = weight * (var + 1e-5).rsqrt()
        return x * scale + (bias - mean * scale)


class OtherFrozenBatchNorm2d(CopiedFrozenBatchNorm2d):
    """The same name and buffers, but another computation."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + 1


@torch.no_grad()
def randomized(model: nn.Module) -> nn.Module:
    generator = torch.Generator().manual_seed(11)
    randomize(model, 2)
    for child in model.modules():
        if type(child).__name__.endswith("FrozenBatchNorm2d"):
            for name, buffer in child.named_buffers():
                values = torch.randn(buffer.shape, generator=generator)
                buffer.copy_(values.abs() + 0.5 if name == "running_var" else values * 0.5 + (name == "weight"))
    return model


def block_of(case: Case, norm: type[nn.Module]) -> tuple[nn.Module, Tensor, Tensor]:
    downsample = None
    if case.shortcut == "projection":
        conv = nn.Conv2d(case.in_channels, case.out_channels, 1, case.stride, bias=False)
        downsample = nn.Sequential(conv, norm(case.out_channels))
    elif case.shortcut == "zeropad":
        downsample = fusedres.ZeroPadShortcut(case.in_channels, case.out_channels, case.stride)
    cls = BasicBlock if case.block == "basic" else Bottleneck
    block = randomized(cls(case.in_channels, case.planes, case.stride, downsample, norm_layer=norm))
    generator = torch.Generator().manual_seed(case.seed)
    x = torch.randn(case.batch, case.in_channels, case.height, case.width, generator=generator)
    return block, x, torch.randn(block(x).shape, generator=generator)


def exact(block: nn.Module, x: Tensor, grad: Tensor) -> Values:
    return run(copy.deepcopy(block).double(), x.double(), grad.double())


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("memory", MEMORY)
@pytest.mark.parametrize("memory_format", FORMATS, ids=label)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=label)
@pytest.mark.parametrize("case", CORE, ids=label)
def test_same_numbers(
    case: Case, dtype: torch.dtype, memory_format: torch.memory_format, memory: str, backend: str
) -> None:
    block, x, grad = block_of(case, FrozenBatchNorm2d)
    block, grad = block.to(dtype), grad.to(dtype)
    x = x.to(dtype).to(memory_format=memory_format)
    twin = fusedres.fuse(copy.deepcopy(block), memory=memory)
    with fusedres.use_backend(backend), expect_paths(fused_forward=1, fused_backward=1):
        got = run(twin, x, grad)
    check_model(got, run(block, x, grad), exact(block, x, grad), dtype, str(case))


@pytest.mark.parametrize("case", CORE[:2], ids=label)
def test_gradcheck_and_frozen_inference(case: Case) -> None:
    block, x, _ = block_of(case, FrozenBatchNorm2d)
    twin = fusedres.fuse(copy.deepcopy(block).double())
    source = x.double()[:2, :, :4, :4].clone().requires_grad_()
    assert torch.autograd.gradcheck(twin, source)
    twin = fusedres.freeze(fusedres.fuse(copy.deepcopy(block).eval()))
    with torch.no_grad(), expect_paths(frozen_forward=1):
        torch.testing.assert_close(twin(x), block(x))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=label)
def test_half_precision_and_autocast(dtype: torch.dtype) -> None:
    """All in half: fused. Under autocast the norm's float32 buffers make its result float32: unfused, with a reason."""
    block, x, grad = block_of(CORE[1], FrozenBatchNorm2d)
    half = copy.deepcopy(block).to(dtype)
    twin = fusedres.fuse(copy.deepcopy(half))
    with expect_paths(fused_forward=1, fused_backward=1):
        got = run(twin, x.to(dtype), grad.to(dtype))
    eager, truth = run(half, x.to(dtype), grad.to(dtype)), exact(half, x.to(dtype), grad.to(dtype))
    assert got["out"].dtype is dtype
    assert (got["out"] - truth["out"]).norm() <= 1.5 * (eager["out"] - truth["out"]).norm()
    twin = fusedres.fuse(copy.deepcopy(block))
    with expect_paths(unfused=1):
        got = run(twin, x, grad, dtype)
    eager = run(block, x, grad, dtype)
    assert got["out"].dtype is eager["out"].dtype is torch.float32
    assert all(torch.equal(value, eager[name]) for name, value in got.items())
    assert "bn1 is torch.float32" in fusedres.report(twin)[0].reason


def test_detection_backbones_are_fused_whole() -> None:
    """As torchvision's detectors have them with pretrained weights: the first layers need no gradient."""
    model = resnet_fpn_backbone(backbone_name="resnet50", weights=None, norm_layer=FrozenBatchNorm2d)
    randomized(model)
    rows = fusedres.report(fusedres.fuse(copy.deepcopy(model)))
    assert len([row for row in rows if row.kind == "Bottleneck" and row.fused]) == 16
    twin = fusedres.fuse(copy.deepcopy(model).double())
    model = model.double()
    x = torch.randn(1, 3, 64, 64, dtype=torch.float64)
    expected, got = model(x), twin(x)
    sum(out.square().mean() for out in expected.values()).backward()
    sum(out.square().mean() for out in got.values()).backward()
    for name, value in expected.items():
        torch.testing.assert_close(got[name], value, rtol=1e-9, atol=1e-9)
    for (name, parameter), other in zip(model.named_parameters(), twin.parameters(), strict=True):
        assert (parameter.grad is None) == (other.grad is None), name
        if parameter.grad is not None:
            torch.testing.assert_close(other.grad, parameter.grad, rtol=1e-7, atol=1e-9)


def test_the_stem_of_a_resnet_too() -> None:
    model = randomized(ResNet(BasicBlock, [1, 1, 1, 1], norm_layer=FrozenBatchNorm2d, num_classes=5)).double()
    twin = fusedres.fuse(copy.deepcopy(model))
    assert all(row.fused for row in fusedres.report(twin))
    x, grad = torch.randn(2, 3, 64, 64, dtype=torch.float64), torch.randn(2, 5, dtype=torch.float64)
    with expect_paths(fused_forward=4, fused_backward=4, stem_forward=1, stem_backward=1):
        got = run(twin, x, grad)
    expected = run(model, x, grad)
    check_model(got, expected, expected, torch.float64, "model")


def test_copies_of_the_class_are_recognised_by_what_they_compute() -> None:
    for norm, fused in ((CopiedFrozenBatchNorm2d, True), (OtherFrozenBatchNorm2d, False)):
        block, x, grad = block_of(CORE[1], norm)
        twin = fusedres.fuse(copy.deepcopy(block))
        (row,) = fusedres.report(twin)
        assert row.fused is fused and (fused or "bn1 is a OtherFrozenBatchNorm2d" in row.reason)
        got, eager = run(twin, x, grad), run(copy.deepcopy(block), x, grad)
        check_model(got, eager, exact(block, x, grad), torch.float32, norm.__name__)


def test_a_replaced_forward_of_the_norm_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    block, x, _ = block_of(CORE[0], FrozenBatchNorm2d)
    twin = fusedres.fuse(copy.deepcopy(block))
    assert fusedres.report(twin)[0].fused
    original = Original.forward
    monkeypatch.setattr(Original, "forward", lambda self, x: 2 * original(self, x))
    assert "bn1 is a FrozenBatchNorm2d" in fusedres.report(twin)[0].reason
    with expect_paths(unfused=1):
        assert torch.equal(twin(x), block(x))


def test_a_parameter_in_the_place_of_a_buffer_is_refused() -> None:
    block, x, _ = block_of(CORE[0], FrozenBatchNorm2d)
    del block.bn1.weight
    block.bn1.weight = nn.Parameter(torch.ones(block.bn1.bias.shape))
    twin = fusedres.fuse(copy.deepcopy(block))
    assert not fusedres.report(twin)[0].fused
    assert torch.equal(twin(x), block(x))
