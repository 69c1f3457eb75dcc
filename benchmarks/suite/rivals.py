"""What others offer for a residual block: each function gives a module that computes the block, or why there is none.

`aten::cudnn_convolution_add_relu` comes with torch. The other packages are taken where they can be imported; nothing is
installed for them. Whoever claims eager's numbers is checked against eager before it is timed, like our own.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from importlib import import_module
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.fusion import fuse_conv_bn_weights
from torchvision.models.resnet import BasicBlock, Bottleneck

Made = nn.Module | str  # a module, or the reason why there is none

_conv_relu = torch.ops.aten.cudnn_convolution_relu
_conv_add_relu = torch.ops.aten.cudnn_convolution_add_relu
NO_BLOCK = "for residual blocks only"


def _imported(name: str) -> Any | str:
    try:
        return import_module(name)
    except Exception as error:  # a package built for another torch fails in many ways
        reason = str(error).strip().partition("\n")[0]
        return f"{name} is not importable: {type(error).__name__}: {reason}"


def _units(block: nn.Module) -> list[tuple[nn.Conv2d, nn.BatchNorm2d]]:
    count = 2 if isinstance(block, BasicBlock) else 3
    return [(getattr(block, f"conv{k}"), getattr(block, f"bn{k}")) for k in range(1, count + 1)]


class _Composed(nn.Module):
    """A block whose norms take over the ReLU behind them; `end` is the last norm with the sum and the last ReLU."""

    def __init__(
        self,
        block: nn.Module,
        norm: Callable[[nn.BatchNorm2d, bool], nn.Module],
        end: Callable[[nn.Module, Tensor, Tensor], Tensor],
    ) -> None:
        super().__init__()
        units = _units(block)
        self.convs = nn.ModuleList(conv for conv, _ in units)
        self.norms = nn.ModuleList(norm(bn, True) for _, bn in units[:-1])
        self.last = norm(units[-1][1], False)
        shortcut = block.downsample
        if isinstance(shortcut, nn.Sequential):
            shortcut = nn.Sequential(shortcut[0], norm(shortcut[1], False))
        self.shortcut, self.end = shortcut, end

    def forward(self, x: Tensor) -> Tensor:
        shortcut = x if self.shortcut is None else self.shortcut(x)
        for conv, norm in zip(self.convs, self.norms, strict=False):
            x = norm(conv(x))
        return self.end(self.last, self.convs[-1](x), shortcut)


# --- torch's own ------------------------------------------------------------------------------------------------------


class _Folded(nn.Module):
    """A convolution with the BatchNorm behind it folded in, in float32, and rounded once."""

    def __init__(self, conv: nn.Conv2d, bn: nn.BatchNorm2d, dtype: torch.dtype) -> None:
        super().__init__()
        weight, bias = fuse_conv_bn_weights(
            conv.weight, conv.bias, bn.running_mean, bn.running_var, bn.eps, bn.weight, bn.bias
        )
        self.register_buffer("weight", weight.detach().to(dtype, memory_format=torch.channels_last))
        self.register_buffer("bias", bias.detach().to(dtype))
        self.geometry = (conv.stride, conv.padding, conv.dilation, conv.groups)

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(x, self.weight, self.bias, *self.geometry)


class _CudnnBlock(nn.Module):
    """Convolution + bias (+ shortcut) + ReLU as single operators of cuDNN."""

    def __init__(self, block: nn.Module, dtype: torch.dtype) -> None:
        super().__init__()
        self.units = nn.ModuleList(_Folded(conv, bn, dtype) for conv, bn in _units(block))
        shortcut = block.downsample
        self.shortcut = _Folded(*shortcut, dtype) if isinstance(shortcut, nn.Sequential) else shortcut

    def forward(self, x: Tensor) -> Tensor:
        shortcut = x if self.shortcut is None else self.shortcut(x)
        *others, last = self.units
        for unit in others:
            x = _conv_relu(x, unit.weight, unit.bias, *unit.geometry)
        return _conv_add_relu(x, last.weight, shortcut, 1.0, last.bias, *last.geometry)


def cudnn(block: nn.Module, x: Tensor, train: bool) -> Made:
    """Inference by aten::cudnn_convolution_relu and aten::cudnn_convolution_add_relu, with folded weights."""
    if train:
        return "aten::cudnn_convolution_add_relu is for inference only"
    if not isinstance(block, BasicBlock | Bottleneck):
        return NO_BLOCK
    module = _CudnnBlock(block, x.dtype)
    try:
        with torch.inference_mode():
            module(x)
    except (RuntimeError, NotImplementedError) as error:
        return f"aten::cudnn_convolution_add_relu cannot be used: {str(error).strip().partition('. ')[0]}"
    return module


# --- packages of others -----------------------------------------------------------------------------------------------


def apex_bottleneck(block: nn.Module, x: Tensor, train: bool) -> Made:
    """apex.contrib.bottleneck: frozen statistics, float16, and the stride on the first convolution."""
    apex = _imported("apex.contrib.bottleneck")
    if isinstance(apex, str):
        return apex
    if train or not isinstance(block, Bottleneck) or block.stride != 1 or x.dtype != torch.float16:
        return "it computes a Bottleneck of stride 1 in float16 with frozen statistics only"
    width = block.conv1.out_channels
    module = apex.Bottleneck(block.conv1.in_channels, width, block.conv3.out_channels, use_cudnn=True)
    # its norms have no eps
    state = {k: v + block.bn1.eps if k.endswith("running_var") else v for k, v in block.state_dict().items()}
    module.load_state_dict(state, strict=False)
    return module.to(x.device, x.dtype, memory_format=torch.channels_last)


def apex_groupbn(block: nn.Module, x: Tensor, train: bool) -> Made:
    """apex.contrib.groupbn: BatchNorm + ReLU and BatchNorm + add + ReLU, float16, around the library's convolutions."""
    apex = _imported("apex.contrib.groupbn.batch_norm")
    if isinstance(apex, str):
        return apex
    if not isinstance(block, BasicBlock | Bottleneck) or x.dtype != torch.float16:
        return "it computes residual blocks in float16 only"

    class Norm(nn.Module):
        def __init__(self, bn: nn.BatchNorm2d, relu: bool) -> None:
            super().__init__()
            self.norm = apex.BatchNorm2d_NHWC(bn.num_features, fuse_relu=relu)
            self.norm.load_state_dict(bn.state_dict(), strict=False)
            self.norm.eps, self.norm.momentum = bn.eps, bn.momentum

        def forward(self, y: Tensor, z: Tensor | None = None) -> Tensor:
            y, z = (t if t is None else t.permute(0, 2, 3, 1) for t in (y, z))
            return (self.norm(y) if z is None else self.norm(y, z)).permute(0, 3, 1, 2)

    def end(last: nn.Module, y: Tensor, shortcut: Tensor) -> Tensor:
        last.norm.fuse_relu = True  # which it wants where there is a sum
        return last(y, shortcut)

    return _Composed(copy.deepcopy(block), Norm, end).to(x.device).train(train)


def inplace_abn(block: nn.Module, x: Tensor, train: bool) -> Made:
    """inplace_abn: BatchNorm and a leaky ReLU in place; another network than eager's, timed beside it."""
    package = _imported("inplace_abn")
    if isinstance(package, str):
        return package
    if not isinstance(block, BasicBlock | Bottleneck):
        return NO_BLOCK

    def norm(bn: nn.BatchNorm2d, relu: bool) -> nn.Module:
        made = package.InPlaceABN(bn.num_features, activation="leaky_relu" if relu else "identity")
        made.load_state_dict(bn.state_dict(), strict=False)
        return made

    def end(last: nn.Module, y: Tensor, shortcut: Tensor) -> Tensor:
        return F.leaky_relu_(last(y) + shortcut, 0.01)

    return _Composed(copy.deepcopy(block), norm, end).to(x.device).train(train)


def cudnn_frontend(block: nn.Module, x: Tensor, train: bool) -> Made:
    """cuDNN's graphs: of what they fuse, torch's own operator has convolution + bias + add + ReLU."""
    found = _imported("cudnn")
    return found if isinstance(found, str) else "no graph is built here; the variant cudnn runs the same fusion"


def tensorrt(module: nn.Module, x: Tensor, train: bool) -> Made:
    """torch_tensorrt, inference of a block or a model."""
    package = _imported("torch_tensorrt")
    if isinstance(package, str):
        return package
    if train:
        return "TensorRT is for inference only"
    return package.compile(copy.deepcopy(module).to(x.dtype), inputs=[x], enabled_precisions={x.dtype})


# Variant → what makes it; those in OTHER compute something else than eager.
OF_BLOCKS: dict[str, Callable[[nn.Module, Tensor, bool], Made]] = {
    "cudnn": cudnn,
    "apex bottleneck": apex_bottleneck,
    "apex groupbn": apex_groupbn,
    "inplace_abn": inplace_abn,
    "cudnn frontend": cudnn_frontend,
    "tensorrt": tensorrt,
}
OTHER = ("inplace_abn",)
