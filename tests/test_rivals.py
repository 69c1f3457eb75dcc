"""The rivals of gpu_suite.py: what torch and other packages offer, with stand-ins for what cannot run here."""

from __future__ import annotations

import copy
import sys
import types
from pathlib import Path

import pytest
import torch
from eager import trust
from torch import Tensor, nn
from torch.nn import functional as F

BENCHMARKS = Path(__file__).resolve().parent.parent / "benchmarks"
BLOCKS = ("tiny.basic", "tiny.basic.projection", "tiny.basic.zero_pad", "tiny.bottleneck", "tiny.bottleneck.projection")
PACKAGES = {
    "apex bottleneck": "apex.contrib.bottleneck",
    "apex groupbn": "apex.contrib.groupbn.batch_norm",
    "inplace_abn": "inplace_abn",
    "cudnn frontend": "cudnn",
    "tensorrt": "torch_tensorrt",
}


@pytest.fixture(autouse=True)
def _scripts(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))


def made(name: str, dtype: torch.dtype = torch.float32) -> tuple[nn.Module, Tensor]:
    import blocks

    block = (blocks.TINY | blocks.STEM)[name]
    return blocks.make_block(block), blocks.make_input(block, 2, torch.device("cpu"), dtype)


def stand_in(monkeypatch, name: str, **what: object) -> None:
    """A package called `name`, and the packages that it is in."""
    parts = name.split(".")
    for count in range(1, len(parts) + 1):
        monkeypatch.setitem(sys.modules, ".".join(parts[:count]), types.ModuleType(parts[count - 1]))
    vars(sys.modules[name]).update(what)


def conv_relu(x, weight, bias, stride, padding, dilation, groups):
    return F.conv2d(x, weight, bias, stride, padding, dilation, groups).relu()


def conv_add_relu(x, weight, z, alpha, bias, stride, padding, dilation, groups):
    return (F.conv2d(x, weight, bias, stride, padding, dilation, groups) + alpha * z).relu()


@pytest.mark.parametrize("name", BLOCKS)
def test_folded_inference_by_cudnns_operators(name, monkeypatch):
    """With the operators written out: the block is eager's in eval mode."""
    from suite import rivals

    monkeypatch.setattr(rivals, "_conv_relu", conv_relu)
    monkeypatch.setattr(rivals, "_conv_add_relu", conv_add_relu)
    block, x = made(name)
    rival = rivals.cudnn(block.eval(), x, train=False)
    torch.testing.assert_close(rival(x), block(x), rtol=1e-4, atol=1e-4)


def test_the_operators_have_these_arguments():
    for name, names in (
        ("cudnn_convolution_relu", "self weight"),
        ("cudnn_convolution_add_relu", "self weight z alpha"),
    ):
        schema = getattr(torch.ops.aten, name).default._schema
        expected = [*names.split(), "bias", "stride", "padding", "dilation", "groups"]
        assert [argument.name for argument in schema.arguments] == expected


def test_reasons_instead_of_modules():
    from suite import rivals

    block, x = made("tiny.bottleneck")
    assert "inference only" in rivals.cudnn(block, x, train=True)
    assert rivals.cudnn(*made("tiny.stem"), train=False) == rivals.NO_BLOCK
    if not torch.cuda.is_available():
        assert "cannot be used: Could not run" in rivals.cudnn(block.eval(), x, train=False)
    assert rivals.OF_BLOCKS.keys() == {"cudnn", *PACKAGES}


@pytest.mark.parametrize("variant", PACKAGES)
def test_a_missing_package_is_a_reason(variant, monkeypatch):
    from suite import rivals

    monkeypatch.setitem(sys.modules, PACKAGES[variant].partition(".")[0], None)
    reason = rivals.OF_BLOCKS[variant](*made("tiny.bottleneck"), False)
    assert isinstance(reason, str) and reason.startswith(f"{PACKAGES[variant]} is not importable: ")


class LeakyNorm(nn.BatchNorm2d):
    """What inplace_abn's norm computes, not in place."""

    def __init__(self, channels: int, activation: str) -> None:
        super().__init__(channels)
        self.activation = activation

    def forward(self, x: Tensor) -> Tensor:
        out = super().forward(x)
        return F.leaky_relu(out, 0.01) if self.activation == "leaky_relu" else out


@pytest.mark.parametrize("name", BLOCKS)
@pytest.mark.parametrize("train", [True, False])
def test_inplace_abn_is_the_block_with_leaky_relus(name, train, monkeypatch):
    from suite import rivals

    stand_in(monkeypatch, "inplace_abn", InPlaceABN=LeakyNorm)
    block, x = made(name)
    rival = rivals.inplace_abn(block.train(train), x, train)
    expected = copy.deepcopy(block)
    expected.relu = nn.LeakyReLU(0.01)
    torch.testing.assert_close(rival(x), expected(x))
    assert "inplace_abn" in rivals.OTHER


class NhwcNorm(nn.BatchNorm2d):
    """What apex's norm computes: on N H W C in half precision, with ReLU, with a sum before it."""

    def __init__(self, channels: int, fuse_relu: bool) -> None:
        super().__init__(channels)
        self.fuse_relu = fuse_relu

    def forward(self, x: Tensor, z: Tensor | None = None) -> Tensor:
        assert x.is_contiguous() and x.dtype == torch.float16 and (z is None or self.fuse_relu)
        out = super().forward(x.float().permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        out = out if z is None else out + z
        return (out.relu() if self.fuse_relu else out).half()


@pytest.mark.parametrize("name", BLOCKS)
def test_apex_groupbn_takes_relu_and_sum_into_the_norm(name, monkeypatch):
    from suite import rivals

    stand_in(monkeypatch, "apex.contrib.groupbn.batch_norm", BatchNorm2d_NHWC=NhwcNorm)
    block, x = made(name, torch.float16)
    assert "float16 only" in rivals.apex_groupbn(block, x.float(), True)
    rival = rivals.apex_groupbn(block.to(memory_format=torch.channels_last), x, True)
    trust(block, x, torch.float16)
    with torch.autocast("cpu", torch.float16):
        ours, eager = rival(x), copy.deepcopy(block)(x)
    torch.testing.assert_close(ours, eager, rtol=2e-2, atol=2e-2)


class FrozenNorm(nn.Module):
    """apex's frozen norm, which has no eps."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        for name in ("weight", "bias", "running_mean", "running_var"):
            self.register_buffer(name, torch.empty(channels))

    def forward(self, x: Tensor) -> Tensor:
        scale = self.weight * self.running_var.rsqrt()
        return x * scale.view(-1, 1, 1) + (self.bias - self.running_mean * scale).view(-1, 1, 1)


class FrozenBottleneck(nn.Module):
    def __init__(self, channels: int, width: int, out: int, use_cudnn: bool) -> None:
        super().__init__()
        assert channels == out and use_cudnn
        for k, (a, b, size) in enumerate(((channels, width, 1), (width, width, 3), (width, out, 1)), 1):
            setattr(self, f"conv{k}", nn.Conv2d(a, b, size, padding=size // 2, bias=False))
            setattr(self, f"bn{k}", FrozenNorm(b))

    def forward(self, x: Tensor) -> Tensor:
        out = self.bn1(self.conv1(x)).relu()
        return (self.bn3(self.conv3(self.bn2(self.conv2(out)).relu())) + x).relu()


def test_apex_bottleneck_freezes_the_statistics(monkeypatch):
    from suite import rivals

    stand_in(monkeypatch, "apex.contrib.bottleneck", Bottleneck=FrozenBottleneck)
    block, x = made("tiny.bottleneck", torch.float16)
    assert "frozen statistics only" in rivals.apex_bottleneck(block, x, True)
    assert "frozen statistics only" in rivals.apex_bottleneck(*made("tiny.bottleneck.projection", x.dtype), False)
    rival = rivals.apex_bottleneck(block.eval(), x, False)
    torch.testing.assert_close(rival(x).float(), block(x.float()), rtol=2e-2, atol=2e-2)


def test_tensorrt_is_given_the_dtype(monkeypatch):
    from suite import rivals

    def compiled(module, inputs, enabled_precisions):
        assert enabled_precisions == {torch.float16} and inputs[0].dtype == torch.float16
        return module

    stand_in(monkeypatch, "torch_tensorrt", compile=compiled)
    block, x = made("tiny.basic", torch.float16)
    assert rivals.tensorrt(block, x, True) == "TensorRT is for inference only"
    assert rivals.tensorrt(block.eval(), x, False).conv1.weight.dtype == torch.float16
    assert block.conv1.weight.dtype == torch.float32


def test_precisions_switch_tf32_and_set_it_back():
    from suite.precision import PRECISIONS

    def state() -> tuple[bool, bool]:
        return torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32

    before = state()
    for name, expected in (("tf32", (True, True)), ("float32", (False, False)), ("bfloat16", before)):
        with PRECISIONS[name].switched():
            assert state() == expected
        assert state() == before
