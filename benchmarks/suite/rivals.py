"""cuDNN's own fusion for inference: aten::cudnn_convolution_relu and aten::cudnn_convolution_add_relu."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.fusion import fuse_conv_bn_weights
from torchvision.models.resnet import BasicBlock, Bottleneck

_conv_relu = torch.ops.aten.cudnn_convolution_relu
_conv_add_relu = torch.ops.aten.cudnn_convolution_add_relu
NO_BLOCK = "for residual blocks only"


def _units(block: nn.Module) -> list[tuple[nn.Conv2d, nn.BatchNorm2d]]:
    count = 2 if isinstance(block, BasicBlock) else 3
    return [(getattr(block, f"conv{k}"), getattr(block, f"bn{k}")) for k in range(1, count + 1)]


class _Folded(nn.Module):
    """A convolution with the BatchNorm after it folded in: in float32, then rounded once."""

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
    """A block with convolution + bias (+ shortcut) + ReLU as single operators of cuDNN."""

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


def cudnn(block: nn.Module, x: Tensor) -> nn.Module | str:
    """Return the block for inference with folded weights, or the reason why there is none."""
    if not isinstance(block, BasicBlock | Bottleneck):
        return NO_BLOCK
    module = _CudnnBlock(block, x.dtype)
    try:
        with torch.inference_mode():
            module(x)
    except (RuntimeError, NotImplementedError) as error:
        return f"aten::cudnn_convolution_add_relu cannot be used: {str(error).strip().partition('. ')[0]}"
    return module
