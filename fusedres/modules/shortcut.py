"""Shortcuts for blocks that change the shape: without parameters, and with an average pool."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, fx, nn


class ZeroPadShortcut(nn.Module):
    """Identity shortcut for different shapes: it subsamples with a stride and fills new channels with zeros.

    y[n, c, p, q] = x[n, c, p·stride, q·stride] for c < in_channels, and 0 for the channels appended after them
    (He et al. 2015, section 3.3, option A). It has no parameters. Inside a fused block it needs no pass of its own.

    Args:
        in_channels: channels of x.
        out_channels: channels of y, at least in_channels.
        stride: stride in both directions, at least 1.

    Shape:
        x (N, in_channels, H, W) → y (N, out_channels, ceil(H / stride), ceil(W / stride)), in x's dtype.

    Raises:
        ValueError: there are fewer output than input channels, or the stride is below 1; in forward: x does not have
            in_channels channels.
    """

    def __init__(self, in_channels: int, out_channels: int, stride: int = 1) -> None:
        super().__init__()
        for name, value in (("in_channels", in_channels), ("out_channels", out_channels), ("stride", stride)):
            if not isinstance(value, int):
                raise TypeError(f"ZeroPadShortcut: {name} must be an int, got {value!r}")
        if out_channels < in_channels or in_channels < 1:
            raise ValueError(
                f"ZeroPadShortcut: out_channels must be at least in_channels ({in_channels}) >= 1, got {out_channels}; "
                "use a projection to shrink"
            )
        if stride < 1:
            raise ValueError(f"ZeroPadShortcut: stride must be at least 1, got {stride}")
        self.in_channels = in_channels
        self.out_channels = out_channels
        self.stride = stride

    def forward(self, x: Tensor) -> Tensor:
        """Return y; see the class."""
        traced = isinstance(x, fx.Proxy)
        if not traced and (x.dim() != 4 or x.shape[1] != self.in_channels):
            raise ValueError(f"ZeroPadShortcut: x must have shape (N, {self.in_channels}, H, W), got {tuple(x.shape)}")
        return F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, 0, self.out_channels - self.in_channels))

    def extra_repr(self) -> str:
        """Return what print(model) shows."""
        return f"{self.in_channels}, {self.out_channels}, stride={self.stride}"


class AvgPoolShortcut(nn.Sequential):
    """BN(conv1x1(avgpool(x))): ResNet-D's shortcut, in which no pixel is left out. Without a stride there is no pool.

    The pool runs as it is; convolution and BatchNorm are fused with the block. The last windows of an odd size are
    smaller (ceil_mode, count_include_pad=False), as in timm.

    Shape:
        x (N, in_channels, H, W) → y (N, out_channels, ceil(H / stride), ceil(W / stride)).

    Source: He et al. 2019, Bag of Tricks for Image Classification, https://arxiv.org/abs/1812.01187, figure 2 (c).
    """

    def __init__(self, in_channels: int, out_channels: int, stride: int = 1) -> None:
        pool = [nn.AvgPool2d(stride, stride, ceil_mode=True, count_include_pad=False)] if stride > 1 else []
        super().__init__(*pool, nn.Conv2d(in_channels, out_channels, 1, bias=False), nn.BatchNorm2d(out_channels))
