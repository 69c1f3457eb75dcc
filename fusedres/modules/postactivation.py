"""Residual blocks with the activation after the add, made of steps: with other gates and activations than ResNet's."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from fusedres.modules.calls import keep_reason
from fusedres.modules.composed_block import ComposedBlock
from fusedres.modules.squeeze_excitation import Excitation
from fusedres.modules.steps import Projection, Steps, projection_of


class PostActBlock(ComposedBlock):
    """out = act(s⊙BN_n(conv_n(… act(BN_1(conv_1(x))))) + S(x)): what the blocks of this file share.

    The steps between the convolutions are those of NormActConv, and what follows the last is one pass, as in
    ResidualTail. Saved for backward are x, the raw results of the convolutions, and one bit for each element of a ReLU
    after the add.

    S is the identity for downsample None. The convolution and BatchNorm that end an nn.Sequential are a step too;
    another module, such as ZeroPadShortcut, is called.

    Raises:
        ValueError, TypeError, RuntimeError: wrong channels, shape, dtype or device of x.
    """

    has_shortcut = True
    excitation_name = ""  # of the child that makes s, if there is one

    def forward(self, x: Tensor) -> Tensor:
        """Return the block's output; see the class."""
        steps = self._steps()
        projection = steps.shortcut if isinstance(steps.shortcut, Projection) else None
        if self.has_shortcut:
            self.check_shortcut(x, None if projection is None or projection.filters else projection.conv[1])
        found, reason = steps.run(type(self).__name__, x)
        keep_reason(self, reason or "")
        return found

    def standing_reason(self) -> str | None:
        """Return why no input runs fused, or None."""
        return self._steps().standing_reason()

    def _steps(self) -> Steps:
        excitation: Any = getattr(self, self.excitation_name) if self.excitation_name else None
        shortcut = projection_of(self.downsample) or self.downsample
        return Steps(self.convs(), self.norms(), self.activation, shortcut, self.has_shortcut, excitation)


class PlainBlock(PostActBlock):
    """out = act(BN2(conv2(act(BN1(conv1(x)))))): ResNet's basic block without its shortcut, for plain networks.

    Shape: x (N, inplanes, H, W) to (N, planes, ceil(H / stride), ceil(W / stride)).

    Source: He et al. 2015, Deep Residual Learning, https://arxiv.org/abs/1512.03385, section 4.1.
    """

    depth = 2
    has_shortcut = False

    def __init__(self, inplanes: int, planes: int, stride: int = 1, activation: nn.Module | None = None) -> None:
        super().__init__(activation, None)
        self.conv1, self.bn1 = nn.Conv2d(inplanes, planes, 3, stride, 1, bias=False), nn.BatchNorm2d(planes)
        self.conv2, self.bn2 = nn.Conv2d(planes, planes, 3, 1, 1, bias=False), nn.BatchNorm2d(planes)


class SEBasicBlock(PostActBlock):
    """out = act(s⊙BN2(y) + S(x)) with y = conv2(act(BN1(conv1(x)))) and s = σ(fc2(relu(fc1(mean of BN2(y))))).

    The means come from those of y, so BN2(y) is not written. See PostActBlock for what runs and what is saved.

    Shape: x (N, inplanes, H, W) to (N, planes, ceil(H / stride), ceil(W / stride)), any floating-point dtype of torch
    that convolutions have; channels_last is the fast format.

    Args:
        downsample: see PostActBlock; it is needed where stride or planes change the shape.
        reduction: how many times fewer channels stand between fc1 and fc2.
        activation: None is nn.ReLU().

    Raises: see PostActBlock, and Excitation for reduction.

    Source: Hu et al. 2018, Squeeze-and-Excitation Networks, https://arxiv.org/abs/1709.01507.
    """

    depth = 2
    excitation_name = "se"

    def __init__(
        self,
        inplanes: int,
        planes: int,
        stride: int = 1,
        downsample: nn.Module | None = None,
        reduction: int = 16,
        activation: nn.Module | None = None,
    ) -> None:
        super().__init__(activation, downsample)
        self.conv1, self.bn1 = nn.Conv2d(inplanes, planes, 3, stride, 1, bias=False), nn.BatchNorm2d(planes)
        self.conv2, self.bn2 = nn.Conv2d(planes, planes, 3, 1, 1, bias=False), nn.BatchNorm2d(planes)
        self.se = Excitation(planes, reduction)


class SEBottleneck(PostActBlock):
    """SEBasicBlock with 1x1, 3x3 (stride) and 1x1 convolutions; the result has expansion·planes channels.

    Args:
        groups, base_width: of the 3x3 convolution, as in torchvision's Bottleneck.

    Source: Hu et al. 2018, Squeeze-and-Excitation Networks, https://arxiv.org/abs/1709.01507, figure 3.
    """

    depth = 3
    expansion = 4
    excitation_name = "se"

    def __init__(
        self,
        inplanes: int,
        planes: int,
        stride: int = 1,
        downsample: nn.Module | None = None,
        groups: int = 1,
        base_width: int = 64,
        reduction: int = 16,
    ) -> None:
        super().__init__(None, downsample)
        width, out = int(planes * (base_width / 64)) * groups, planes * self.expansion
        self.conv1, self.bn1 = nn.Conv2d(inplanes, width, 1, bias=False), nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, stride, 1, groups=groups, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.conv3, self.bn3 = nn.Conv2d(width, out, 1, bias=False), nn.BatchNorm2d(out)
        self.se = Excitation(out, reduction)
