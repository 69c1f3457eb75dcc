"""The measured blocks of the residual family besides ResNet's: each as its equation in plain PyTorch, and fused."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.ops import stochastic_depth

import fusedres
from common.networks import Convolution


def _branch(channels: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(channels, channels, 3, padding=1, bias=False), nn.BatchNorm2d(channels), nn.ReLU(),
        nn.Conv2d(channels, channels, 3, padding=1, bias=False),
    )  # fmt: skip


def _projection(inplanes: int, planes: int) -> nn.Conv2d:
    return nn.Conv2d(inplanes, planes, 1, 2, bias=False)


def _preact(m: Any, x: Tensor) -> Tensor:
    a = F.relu(m.bn1(x))
    h = m.conv2(F.relu(m.bn2(m.conv1(a))))
    h = m.conv3(F.relu(m.bn3(h))) if hasattr(m, "conv3") else h
    return h + (x if m.downsample is None else m.downsample(a))


def _postact(m: Any, x: Tensor) -> Tensor:
    h = m.bn2(m.conv2(F.relu(m.bn1(m.conv1(x)))))
    h = m.bn3(m.conv3(F.relu(h))) if hasattr(m, "conv3") else h
    if hasattr(m, "se"):
        h = m.se(h) * h
    if isinstance(m, fusedres.PlainBlock):
        return F.relu(h)
    return F.relu(h + (x if m.downsample is None else m.downsample(x)))


def _highway(m: Any, x: Tensor) -> Tensor:
    gate = torch.sigmoid(m.gate(x))
    return gate * F.relu(m.tail.norm(m.transform(x))) + (1 - gate) * x


def _scaled(m: Any, x: Tensor) -> Tensor:
    return x + (m.scale.view(-1, 1, 1) if m.scale.dim() else m.scale) * m.tail.norm(m.branch(x))


def _dropping(m: Any, x: Tensor) -> Tensor:
    return F.relu(x + stochastic_depth(m.tail.norm(m.branch(x)), m.rate, m.mode, m.training))


@dataclass(frozen=True)
class Design:
    """A block of the family: its module, its equation, and the shape of its input."""

    make: Callable[[], nn.Module]
    equation: Callable[[Any, Tensor], Tensor]
    in_channels: int
    size: int
    kind: str = "design"
    stride: int = 1
    shortcut: str = "own"

    def eager(self) -> nn.Module:
        """Return the module with the equation in plain PyTorch as its forward."""
        module = self.make()
        cls, equation = type(module), self.equation
        module.__class__ = type(f"Eager{cls.__name__}", (cls,), {"forward": lambda m, x: equation(m, x), "fused": cls})
        return module

    @cached_property
    def out_shape(self) -> tuple[int, int]:
        """Channels and size of the result."""
        shape = self._watched()[1]
        return shape[1], shape[2]

    @property
    def out_channels(self) -> int:
        return self.out_shape[0]

    planes = out_channels

    @property
    def out_size(self) -> int:
        return self.out_shape[1]

    @cached_property
    def convolutions(self) -> list[Convolution]:
        """The convolutions in the order they run; name is their path. Those of single pixels are left out."""
        return self._watched()[0]

    def _watched(self) -> tuple[list[Convolution], tuple[int, ...]]:
        found: list[Convolution] = []
        module = self.eager().eval()

        def hook(name: str) -> Callable[..., None]:
            def watch(conv: nn.Conv2d, inputs: tuple[Tensor], out: Tensor) -> None:
                (x,) = inputs
                if x.shape[2] > 1:
                    sizes = conv.in_channels, conv.out_channels, conv.kernel_size[0], conv.stride[0]
                    found.append(Convolution(name, *sizes, x.shape[2], out.shape[2]))

            return watch

        for name, part in module.named_modules():
            if isinstance(part, nn.Conv2d):
                part.register_forward_hook(hook(name))
        with torch.no_grad():
            out = module(torch.zeros(1, self.in_channels, self.size, self.size))
        return found, tuple(out.shape)


def fused(module: nn.Module) -> nn.Module:
    """Turn a module of `eager` into the fused one, in place, and return it."""
    module.__class__ = module.fused  # type: ignore[assignment]
    return module


def _designs(c: int, size: int, wide: int, groups: int) -> dict[str, Design]:
    """Return every design for basic blocks of c channels and bottlenecks of `wide`, on images of this size."""
    made = {
        "preact.basic": (lambda: fusedres.PreActBasicBlock(c, c), _preact, c),
        "preact.basic.projection": (lambda: fusedres.PreActBasicBlock(c, 2 * c, 2, _projection(c, 2 * c)), _preact, c),
        "preact.bottleneck": (lambda: fusedres.PreActBottleneck(wide, wide // 4), _preact, wide),
        "wide": (lambda: fusedres.WideBlock(2 * c, 2 * c), _preact, 2 * c),
        "plain": (lambda: fusedres.PlainBlock(c, c), _postact, c),
        "se.basic": (lambda: fusedres.SEBasicBlock(c, c, reduction=4), _postact, c),
        "se.bottleneck": (lambda: fusedres.SEBottleneck(wide, wide // 4), _postact, wide),
        "resnext": (lambda: fusedres.ResNeXtBottleneck(wide, wide // 4, groups=groups), _postact, wide),
        "resnet_d": (
            lambda: fusedres.FusedBasicBlock(c, 2 * c, 2, fusedres.AvgPoolShortcut(c, 2 * c, 2)), _postact, c,
        ),
        "highway": (lambda: fusedres.HighwayConv2d(c, with_norm=True), _highway, c),
        "rezero": (lambda: fusedres.ReZero(_branch(c), nn.BatchNorm2d(c)), _scaled, c),
        "layer_scale": (lambda: fusedres.LayerScale(_branch(c), c, 0.1, nn.BatchNorm2d(c)), _scaled, c),
        "stochastic_depth": (
            lambda: fusedres.StochasticDepth(_branch(c), 0.2, "row", nn.BatchNorm2d(c), nn.ReLU()), _dropping, c,
        ),
    }  # fmt: skip
    return {name: Design(make, equation, channels, size) for name, (make, equation, channels) in made.items()}


DESIGNS = _designs(64, 56, 256, 32)
TINY_DESIGNS = {f"tiny.{name}": design for name, design in _designs(8, 8, 64, 4).items()}
