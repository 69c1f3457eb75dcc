"""The shapes of ResNets: the residual blocks of each model by name, and their convolutions."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar


@dataclass(frozen=True)
class Block:
    """The shapes of a residual block: `size` is the height and width of its input, `planes` as in torchvision."""

    kind: str  # "basic" or "bottleneck"
    in_channels: int
    planes: int
    size: int
    stride: int = 1
    shortcut: str = "identity"  # "identity", "projection" or "zero_pad"

    def __post_init__(self) -> None:
        if self.kind not in ("basic", "bottleneck"):
            raise ValueError(f"Block: kind must be 'basic' or 'bottleneck', got {self.kind!r}")
        if self.shortcut not in ("identity", "projection", "zero_pad"):
            raise ValueError(f"Block: shortcut must be 'identity', 'projection' or 'zero_pad', got {self.shortcut!r}")
        if self.shortcut == "identity" and (self.stride != 1 or self.in_channels != self.out_channels):
            raise ValueError(f"Block: an identity shortcut needs equal shapes, got {self}")

    @property
    def out_channels(self) -> int:
        return self.planes * (4 if self.kind == "bottleneck" else 1)

    @property
    def out_size(self) -> int:
        return (self.size + self.stride - 1) // self.stride

    @property
    def convolutions(self) -> list[Convolution]:
        """The convolutions of the residual branch in the order they run, then the projection."""
        s, t = self.size, self.out_size
        if self.kind == "basic":
            convs = [
                Convolution("conv1", self.in_channels, self.planes, 3, self.stride, s, t),
                Convolution("conv2", self.planes, self.planes, 3, 1, t, t),
            ]
        else:
            convs = [
                Convolution("conv1", self.in_channels, self.planes, 1, 1, s, s),
                Convolution("conv2", self.planes, self.planes, 3, self.stride, s, t),
                Convolution("conv3", self.planes, self.out_channels, 1, 1, t, t),
            ]
        if self.shortcut == "projection":
            convs.append(Convolution("projection", self.in_channels, self.out_channels, 1, self.stride, s, t))
        return convs


@dataclass(frozen=True)
class Convolution:
    """The shapes of a convolution; `source` and `target` are the elements of its input and output per image."""

    name: str
    in_channels: int
    out_channels: int
    kernel: int
    stride: int
    in_size: int
    out_size: int

    @property
    def source(self) -> int:
        return self.in_channels * self.in_size**2

    @property
    def touched(self) -> int:
        """Elements of the input that are used: a strided 1x1 convolution reads one pixel of stride² pixels."""
        return self.in_channels * self.out_size**2 if self.kernel == 1 else self.source

    @property
    def target(self) -> int:
        return self.out_channels * self.out_size**2

    @property
    def weight(self) -> int:
        return self.in_channels * self.out_channels * self.kernel**2

    @property
    def flops(self) -> int:
        """Operations of the forward pass per image; dgrad and wgrad each cost the same again."""
        return 2 * self.weight * self.out_size**2


@dataclass(frozen=True)
class Stem:
    """conv1, bn1, relu and maxpool of a ResNet, described like a block; `size` is the height and width of images."""

    size: int = 224

    kind: ClassVar[str] = "stem"
    shortcut: ClassVar[str] = "none"
    in_channels: ClassVar[int] = 3
    planes: ClassVar[int] = 64
    out_channels: ClassVar[int] = 64
    stride: ClassVar[int] = 4

    @property
    def out_size(self) -> int:
        return (self.size + 3) // 4

    @property
    def convolutions(self) -> list[Convolution]:
        """The only convolution of the stem; images need no gradient."""
        return [Convolution("conv1", 3, 64, 7, 2, self.size, (self.size + 1) // 2)]


def resnet_blocks(depth: int, image: int = 224) -> dict[str, Block]:
    """Return every residual block of torchvision's ResNet-18, 34 or 50 by its name in the model."""
    layouts = {18: ("basic", (2, 2, 2, 2)), 34: ("basic", (3, 4, 6, 3)), 50: ("bottleneck", (3, 4, 6, 3))}
    if depth not in layouts:
        raise ValueError(f"resnet_blocks: depth must be one of {sorted(layouts)}, got {depth}")
    kind, counts = layouts[depth]
    blocks, channels, size = {}, 64, image // 4
    for stage, count in enumerate(counts):
        for index in range(count):
            stride = 2 if stage and not index else 1
            planes = 64 << stage
            out = planes * (4 if kind == "bottleneck" else 1)
            shortcut = "projection" if stride != 1 or channels != out else "identity"
            block = Block(kind, channels, planes, size, stride, shortcut)
            blocks[f"layer{stage + 1}.{index}"] = block
            channels, size = out, block.out_size
    return blocks
