"""The networks for CIFAR of He et al. 2015 and 2016: residual, pre-activation and plain, for images of about 32x32.

A 3x3 convolution, three stages of n blocks with 16, 32 and 64 channels at 32x32, 16x16 and 8x8, the mean over the
pixels, and a linear classifier: 6n + 2 layers with basic blocks, 9n + 2 with bottlenecks.

| network | blocks | shortcut | parameters |
| --- | --- | --- | --- |
| `resnet20` … `resnet110` | FusedBasicBlock | option A, B or C | 0.27, 0.46, 0.66, 0.85, 1.7 million with A |
| `preact_resnet20` … `preact_resnet110` | PreActBasicBlock | identity, or a projection | as `resnet` with B |
| `preact_resnet164`, `preact_resnet1001` | PreActBottleneck | the same | 1.7 and 10.3 million |
| `plain20` … `plain110` | PlainBlock | none | as `resnet` with A |

`resnet`, `preact_resnet` and `plain` take any depth.

Source: He et al. 2015, Deep Residual Learning, https://arxiv.org/abs/1512.03385, section 4.2; He et al. 2016, Identity
Mappings in Deep Residual Networks, https://arxiv.org/abs/1603.05027.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn

from fusedres.modules import (
    FusedBasicBlock,
    PlainBlock,
    PreActBasicBlock,
    PreActBottleneck,
    PreActSequential,
    ResidualTail,
    ZeroPadShortcut,
)

MakeBlock = Callable[[int, int, int], nn.Module]  # of input channels, channels and stride


class CifarNetwork(nn.Module):
    """A network for CIFAR of any blocks; see the head of this file.

    Shape: images (N, 3, H, W) to (N, num_classes).

    Args:
        make_block: makes a block of input channels, channels and stride.
        blocks: of each stage.
        expansion: how many times more channels a block returns than it is made of.
        preactivated: BatchNorm and ReLU stand after the last block, not after the first convolution.

    Raises: ValueError: blocks is less than 1.
    """

    def __init__(
        self,
        make_block: MakeBlock,
        blocks: int,
        num_classes: int = 10,
        expansion: int = 1,
        preactivated: bool = False,
    ) -> None:
        super().__init__()
        if blocks < 1:
            raise ValueError(f"CifarNetwork: blocks must be at least 1, got {blocks!r}")
        self.preactivated = preactivated
        self.conv1 = nn.Conv2d(3, 16, 3, padding=1, bias=False)
        self.layer1 = _stage(make_block, blocks, (16, 16), expansion, 1)
        self.layer2 = _stage(make_block, blocks, (16 * expansion, 32), expansion, 2)
        self.layer3 = _stage(make_block, blocks, (32 * expansion, 64), expansion, 2)
        channels = 64 * expansion
        self.tail = ResidualTail(nn.BatchNorm2d(channels if preactivated else 16), activation=nn.ReLU())
        self.fc = nn.Linear(channels, num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, x: Tensor) -> Tensor:
        """Return the logits; see the class."""
        x = self.conv1(x)
        if not self.preactivated:
            x = self.tail(x)
        for layer in (self.layer1, self.layer2, self.layer3):
            x = layer(x)
        if self.preactivated:
            x = self.tail(x)
        result: Tensor = self.fc(x.mean((2, 3)))
        return result


def _stage(
    make_block: MakeBlock, blocks: int, channels: tuple[int, int], expansion: int, stride: int
) -> PreActSequential:
    """Return blocks in a row; channels: of the input, and those that a block is made of. The first has the stride."""
    inplanes, planes = channels
    first = make_block(inplanes, planes, stride)
    return PreActSequential(first, *(make_block(planes * expansion, planes, 1) for _ in range(blocks - 1)))


def _shortcut(option: str, inplanes: int, planes: int, stride: int) -> nn.Module | None:
    """Return the shortcut of a basic block by the options of He et al. 2015: A pads, B and C project."""
    changes = stride != 1 or inplanes != planes
    if option == "A":
        return ZeroPadShortcut(inplanes, planes, stride) if changes else None
    if option == "C" or changes:
        return nn.Sequential(nn.Conv2d(inplanes, planes, 1, stride, bias=False), nn.BatchNorm2d(planes))
    return None


def _depth(name: str, depth: int, layers: int) -> int:
    """Return the blocks of a stage for this depth, with this many layers in the blocks of all stages."""
    if depth < layers + 2 or (depth - 2) % layers:
        raise ValueError(f"{name}: depth must be {layers}n + 2, got {depth!r}")
    return (depth - 2) // layers


def resnet(depth: int, shortcut: str = "A", num_classes: int = 10) -> CifarNetwork:
    """Return the ResNet for CIFAR of this depth, 6n + 2; see resnet20.

    Raises: ValueError: depth or shortcut is none of these.
    """
    if shortcut not in ("A", "B", "C"):
        raise ValueError(f"resnet{depth}: shortcut must be one of A, B, C, got {shortcut!r}")

    def make(inplanes: int, planes: int, stride: int) -> nn.Module:
        return FusedBasicBlock(inplanes, planes, stride, _shortcut(shortcut, inplanes, planes, stride))

    return CifarNetwork(make, _depth("resnet", depth, 6), num_classes)


def preact_resnet(depth: int, num_classes: int = 10, bottleneck: bool = False) -> CifarNetwork:
    """Return the pre-activation ResNet for CIFAR of this depth: 6n + 2, or 9n + 2 of bottlenecks.

    Raises: ValueError: depth is none of these.
    """
    kind: type[PreActBasicBlock] | type[PreActBottleneck] = PreActBottleneck if bottleneck else PreActBasicBlock
    expansion = PreActBottleneck.expansion if bottleneck else 1

    def make(inplanes: int, planes: int, stride: int) -> nn.Module:
        changes = stride != 1 or inplanes != planes * expansion
        projection = nn.Conv2d(inplanes, planes * expansion, 1, stride, bias=False) if changes else None
        return kind(inplanes, planes, stride, projection)

    return CifarNetwork(make, _depth("preact_resnet", depth, 9 if bottleneck else 6), num_classes, expansion, True)


def plain(depth: int, num_classes: int = 10) -> CifarNetwork:
    """Return the ResNet for CIFAR of this depth, 6n + 2, without its shortcuts.

    Raises: ValueError: depth is none of these.
    """
    return CifarNetwork(PlainBlock, _depth("plain", depth, 6), num_classes)


def resnet20(shortcut: str = "A", num_classes: int = 10) -> CifarNetwork:
    """Return ResNet-20 for CIFAR; shortcut: where the shape changes "A" pads with zeros, "B" projects; "C" always does.

    Raises: ValueError: shortcut is none of these.
    """
    return resnet(20, shortcut, num_classes)


def resnet32(shortcut: str = "A", num_classes: int = 10) -> CifarNetwork:
    """Return ResNet-32 for CIFAR; see resnet20."""
    return resnet(32, shortcut, num_classes)


def resnet44(shortcut: str = "A", num_classes: int = 10) -> CifarNetwork:
    """Return ResNet-44 for CIFAR; see resnet20."""
    return resnet(44, shortcut, num_classes)


def resnet56(shortcut: str = "A", num_classes: int = 10) -> CifarNetwork:
    """Return ResNet-56 for CIFAR; see resnet20."""
    return resnet(56, shortcut, num_classes)


def resnet110(shortcut: str = "A", num_classes: int = 10) -> CifarNetwork:
    """Return ResNet-110 for CIFAR; see resnet20."""
    return resnet(110, shortcut, num_classes)


def preact_resnet20(num_classes: int = 10) -> CifarNetwork:
    """Return the pre-activation ResNet-20 for CIFAR."""
    return preact_resnet(20, num_classes)


def preact_resnet32(num_classes: int = 10) -> CifarNetwork:
    """Return the pre-activation ResNet-32 for CIFAR."""
    return preact_resnet(32, num_classes)


def preact_resnet44(num_classes: int = 10) -> CifarNetwork:
    """Return the pre-activation ResNet-44 for CIFAR."""
    return preact_resnet(44, num_classes)


def preact_resnet56(num_classes: int = 10) -> CifarNetwork:
    """Return the pre-activation ResNet-56 for CIFAR."""
    return preact_resnet(56, num_classes)


def preact_resnet110(num_classes: int = 10) -> CifarNetwork:
    """Return the pre-activation ResNet-110 for CIFAR."""
    return preact_resnet(110, num_classes)


def preact_resnet164(num_classes: int = 10) -> CifarNetwork:
    """Return the pre-activation ResNet-164 for CIFAR, of bottlenecks."""
    return preact_resnet(164, num_classes, bottleneck=True)


def preact_resnet1001(num_classes: int = 10) -> CifarNetwork:
    """Return the pre-activation ResNet-1001 for CIFAR, of bottlenecks."""
    return preact_resnet(1001, num_classes, bottleneck=True)


def plain20(num_classes: int = 10) -> CifarNetwork:
    """Return ResNet-20 for CIFAR without its shortcuts."""
    return plain(20, num_classes)


def plain32(num_classes: int = 10) -> CifarNetwork:
    """Return ResNet-32 for CIFAR without its shortcuts."""
    return plain(32, num_classes)


def plain44(num_classes: int = 10) -> CifarNetwork:
    """Return ResNet-44 for CIFAR without its shortcuts."""
    return plain(44, num_classes)


def plain56(num_classes: int = 10) -> CifarNetwork:
    """Return ResNet-56 for CIFAR without its shortcuts."""
    return plain(56, num_classes)


def plain110(num_classes: int = 10) -> CifarNetwork:
    """Return ResNet-110 for CIFAR without its shortcuts."""
    return plain(110, num_classes)
