"""Residual blocks as other packages and users write them, whose names and calls differ from torchvision's.

Each follows the published code of the family that it is named after in its order of calls.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class Shortcut(nn.Module):
    """A block of two 3x3 convolutions as in speaker verification: functional ReLU, an empty Sequential as identity."""

    def __init__(self, in_planes: int, planes: int, stride: int = 1) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_planes, planes, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(planes)
        self.conv2 = nn.Conv2d(planes, planes, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(planes)
        self.shortcut = nn.Sequential()
        if stride != 1 or in_planes != planes:
            self.shortcut = nn.Sequential(nn.Conv2d(in_planes, planes, 1, stride, bias=False), nn.BatchNorm2d(planes))

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        out += self.shortcut(x)
        return F.relu(out)


class Named(nn.Module):
    """A bottleneck in the style of OpenMMLab: norms found by a name that is an attribute, an inner function, drop path.

    with_cp stands for gradient checkpointing.
    """

    def __init__(self, in_channels: int, planes: int, stride: int = 1, downsample: nn.Module | None = None) -> None:
        super().__init__()
        self.norm1_name, self.norm2_name, self.norm3_name = "bn1", "bn2", "bn3"
        self.conv1 = nn.Conv2d(in_channels, planes, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(planes)
        self.conv2 = nn.Conv2d(planes, planes, 3, stride, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(planes)
        self.conv3 = nn.Conv2d(planes, 4 * planes, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(4 * planes)
        self.relu = nn.ReLU(inplace=True)
        self.downsample = downsample
        self.drop_path = nn.Identity()
        self.with_cp = False

    @property
    def norm1(self) -> nn.Module:
        return getattr(self, self.norm1_name)

    @property
    def norm2(self) -> nn.Module:
        return getattr(self, self.norm2_name)

    @property
    def norm3(self) -> nn.Module:
        return getattr(self, self.norm3_name)

    def forward(self, x: Tensor) -> Tensor:
        def inner(x: Tensor) -> Tensor:
            out = self.relu(self.norm1(self.conv1(x)))
            out = self.relu(self.norm2(self.conv2(out)))
            out = self.norm3(self.conv3(out))
            identity = x if self.downsample is None else self.downsample(x)
            out = self.drop_path(out)
            out += identity
            return out

        if self.with_cp and x.requires_grad:
            return self.relu(torch.utils.checkpoint.checkpoint(inner, x, use_reentrant=False))
        return self.relu(inner(x))


class ConvLayer(nn.Module):
    """Convolution, norm and activation in one module, as in transformers."""

    def __init__(self, in_channels: int, out_channels: int, size: int = 3, stride: int = 1, act: bool = True) -> None:
        super().__init__()
        self.convolution = nn.Conv2d(in_channels, out_channels, size, stride, size // 2, bias=False)
        self.normalization = nn.BatchNorm2d(out_channels)
        self.activation = nn.ReLU() if act else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return self.activation(self.normalization(self.convolution(x)))


class Nested(nn.Module):
    """A block whose parts are in modules of their own, as in transformers; the shortcut is one of them."""

    def __init__(self, in_channels: int, out_channels: int, stride: int = 1) -> None:
        super().__init__()
        plain = in_channels == out_channels and stride == 1
        self.shortcut = nn.Identity() if plain else ConvLayer(in_channels, out_channels, 1, stride, False)
        self.layer = nn.Sequential(
            ConvLayer(in_channels, out_channels, 3, stride), ConvLayer(out_channels, out_channels, act=False)
        )
        self.activation = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        residual = x
        x = self.layer(x)
        residual = self.shortcut(residual)
        return self.activation(torch.add(x, residual))


class Blurred(nn.Module):
    """A block with anti-aliasing: a fixed blur with stride 2 before the second convolution, a pool in the shortcut."""

    def __init__(self, in_channels: int, out_channels: int, units: int = 2) -> None:
        super().__init__()
        width = in_channels
        self.head = nn.Sequential()
        if units == 3:
            self.head = nn.Sequential(nn.Conv2d(width, width, 1, bias=False), nn.BatchNorm2d(width), nn.ReLU())
        self.conv1 = nn.Conv2d(width, out_channels, 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(out_channels)
        self.blur = Blur(out_channels)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(out_channels)
        self.downsample = nn.Sequential(
            nn.AvgPool2d(2, ceil_mode=True, count_include_pad=False),
            nn.Conv2d(in_channels, out_channels, 1, bias=False),
            nn.BatchNorm2d(out_channels),
        )

    def forward(self, x: Tensor) -> Tensor:
        out = self.blur(self.bn1(self.conv1(self.head(x))).relu())
        out = self.bn2(self.conv2(out)) + self.downsample(x)
        return torch.relu(out)


class Blur(nn.Module):
    """A binomial filter of every channel, with stride 2."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        row = torch.tensor([1.0, 2.0, 1.0]) / 4
        self.register_buffer("kernel", (row[:, None] * row).expand(channels, 1, 3, 3).clone())

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(x, self.get_buffer("kernel"), stride=2, padding=1, groups=x.shape[1])


class ConvAct(nn.Module):
    """Convolution, norm and activation as in YOLO; all share one activation."""

    default_act = nn.SiLU(inplace=True)

    def __init__(self, in_channels: int, out_channels: int, size: int = 3, act: nn.Module | None = None) -> None:
        super().__init__()
        self.conv = nn.Conv2d(in_channels, out_channels, size, 1, size // 2, bias=False)
        self.bn = nn.BatchNorm2d(out_channels, eps=1e-3, momentum=0.03)
        self.act = self.default_act if act is None else act

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.bn(self.conv(x)))

    def forward_fuse(self, x: Tensor) -> Tensor:
        return self.act(self.conv(x))


class ConvActs(nn.Module):
    """YOLO's bottleneck: the sum comes after the activation, and only where the channels agree."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.cv1 = ConvAct(in_channels, 8)
        self.cv2 = ConvAct(8, out_channels)
        self.add = in_channels == out_channels

    def forward(self, x: Tensor) -> Tensor:
        return x + self.cv2(self.cv1(x)) if self.add else self.cv2(self.cv1(x))


class IBasicBlock(nn.Module):
    """The block of iresnet for face recognition: it begins with a norm, and has PReLU inside and none after the sum."""

    def __init__(self, inplanes: int, planes: int, stride: int = 1) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(inplanes, eps=1e-05)
        self.conv1 = nn.Conv2d(inplanes, planes, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(planes, eps=1e-05)
        self.prelu = nn.PReLU(planes)
        self.conv2 = nn.Conv2d(planes, planes, 3, stride, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(planes, eps=1e-05)
        self.downsample: nn.Module | None = None
        if stride != 1 or inplanes != planes:
            self.downsample = nn.Sequential(
                nn.Conv2d(inplanes, planes, 1, stride, bias=False), nn.BatchNorm2d(planes, eps=1e-05)
            )
        self.stride = stride

    def forward(self, x: Tensor) -> Tensor:
        identity = x
        out = self.bn1(x)
        out = self.conv1(out)
        out = self.bn2(out)
        out = self.prelu(out)
        out = self.conv2(out)
        out = self.bn3(out)
        if self.downsample is not None:
            identity = self.downsample(x)
        out += identity
        return out


class PreActivated(nn.Module):
    """A block that normalises before its convolutions (He et al. 2016), with ReLU as a function."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.bn1, self.bn2 = nn.BatchNorm2d(channels), nn.BatchNorm2d(channels)
        self.conv1 = nn.Conv2d(channels, channels, 3, 1, 1, bias=False)
        self.conv2 = nn.Conv2d(channels, channels, 3, 1, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        out = self.conv1(F.relu(self.bn1(x), inplace=True))
        return self.conv2(F.relu(self.bn2(out), inplace=True)) + x
