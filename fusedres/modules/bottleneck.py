"""torchvision's Bottleneck, fused."""

from __future__ import annotations

from torch import nn
from torchvision.models.resnet import Bottleneck

from fusedres.modules.fused_block import FusedBlock
from fusedres.modules.parts import Parts, UnitPaths


class FusedBottleneck(FusedBlock, Bottleneck):
    """torchvision's Bottleneck with its passes fused: same constructor, children, state_dict and results.

    out = relu(BN3(conv3(relu(BN2(conv2(relu(BN1(conv1(x))))))) + S(x)). The convolutions are 1x1, 3x3 and 1x1; the 3x3
    has the stride. S is as in FusedBasicBlock (He et al. 2015, figure 5; groups and width as in ResNeXt and Wide
    ResNet).

    Shape:
        x (N, inplanes, H, W), float32, float64, bfloat16 or float16 → (N, 4·planes, ceil(H / stride),
        ceil(W / stride)) in x's memory format; channels_last is the fast one.

    Saved for backward: x, the raw convolution outputs, and one bit per element. With memory="min" the outputs of conv3
    and the projection, the largest tensors, are not saved if there are at least 16 rows per input channel
    (ops.one_pass); in 16 bits on a CPU they are computed again in backward.

    Raises:
        ValueError, TypeError, RuntimeError: wrong channels, shape, dtype or device; nothing is updated then.
    """

    _stock = Bottleneck
    _base = Bottleneck
    _parts = Parts(
        (UnitPaths("conv1", "bn1"), UnitPaths("conv2", "bn2"), UnitPaths("conv3", "bn3")),
        ("relu",),
        downsample="downsample",
    ).named()


class ResNeXtBottleneck(FusedBottleneck):
    """FusedBottleneck whose 3x3 convolution has groups: 32 of 4·planes / 64 channels each, if nothing else is given.

    Source: Xie et al. 2017, Aggregated Residual Transformations, https://arxiv.org/abs/1611.05431.
    """

    def __init__(
        self,
        inplanes: int,
        planes: int,
        stride: int = 1,
        downsample: nn.Module | None = None,
        groups: int = 32,
        base_width: int = 4,
    ) -> None:
        super().__init__(inplanes, planes, stride, downsample, groups, base_width)
