"""Pre-activation residual blocks: BatchNorm and activation stand before each convolution, and nothing after the add."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, fx, nn
from torch.nn.modules.utils import _pair

from fusedres.errors import ShapeError
from fusedres.modules.calls import keep_reason
from fusedres.modules.norm_act_conv import run_unit, standing_reason
from fusedres.values import Geometry


class PreActBlock(nn.Module):
    """y = S(x) + F(x) with F = conv_n(act(bn_n(… conv_1(act(bn_1(x)))))): what the pre-activation blocks share.

    Each convolution with the BatchNorm and activation before it is a step as in NormActConv, and its result takes the
    shortcut in place. Saved for backward are x and the results of all convolutions but the last: half of what torch
    saves.

    A downsample that is an nn.Conv2d reads act(bn_1(x)), as in the paper; another module, such as ZeroPadShortcut,
    reads x; None is the identity.

    Raises:
        ValueError, TypeError, RuntimeError: wrong channels, shape, dtype or device of x.
    """

    depth: int  # of F, in convolutions

    def __init__(self, activation: nn.Module | None, downsample: nn.Module | None) -> None:
        super().__init__()
        self.activation = nn.ReLU() if activation is None else activation
        self.downsample = downsample

    def forward(self, x: Tensor) -> Tensor:
        """Return the block's output; see the class."""
        op = type(self).__name__
        self._check_shortcut(x)
        reasons: list[str | None] = []
        h, shortcut = x, x
        for index, (norm, convs) in enumerate(self._units()):
            found, reason = run_unit(op, h, norm, self.activation, convs)
            reasons.append(reason)
            h = found[0]
            if len(found) == 2:
                shortcut = found[1]
            elif index == 0 and self.downsample is not None:
                shortcut = self.downsample(x)
        first = next((reason for reason in reasons if reason is not None), None)
        keep_reason(self, first or "")
        if first is None and h.dtype is shortcut.dtype and h.shape == shortcut.shape:
            return h.add_(shortcut)
        return h + shortcut

    def _check_shortcut(self, x: Any) -> None:
        """Raise where the shortcut has another shape than the branch."""
        branch = [conv for _, convs in self._units() for name, conv in convs.items() if name != "downsample"]
        if x.dim() != 4 or isinstance(x, fx.Proxy) or not all(map(_is_plain, branch)):
            return  # the step itself raises, or its modules do
        reached = _reached(tuple(x.shape), branch)
        start = tuple(x.shape) if self.downsample is None else reached
        if _is_plain(self.downsample):
            start = _reached(tuple(x.shape), [self.downsample])
        if start != reached:
            raise ShapeError(
                f"{type(self).__name__}: the shortcut must have shape {reached} like the residual branch, got {start}; "
                "give the block a downsample (1x1 convolution, or ZeroPadShortcut) that reaches it"
            )

    def standing_reason(self) -> str | None:
        """Return why no input runs fused, or None."""
        found = (standing_reason(norm, self.activation, convs) for norm, convs in self._units())
        return next((reason for reason in found if reason is not None), None)

    def _units(self) -> list[tuple[tuple[str, nn.Module], dict[str, nn.Module]]]:
        """Return each BatchNorm with the convolutions that read it, by their names."""
        units: list[tuple[tuple[str, nn.Module], dict[str, nn.Module]]] = []
        for index in range(1, self.depth + 1):
            convs = {f"conv{index}": getattr(self, f"conv{index}")}
            if index == 1 and isinstance(self.downsample, nn.Conv2d):
                convs["downsample"] = self.downsample
            units.append(((f"bn{index}", getattr(self, f"bn{index}")), convs))
        return units


def _is_plain(conv: nn.Module | None) -> bool:
    return type(conv) is nn.Conv2d and not isinstance(conv.padding, str)


def _reached(shape: tuple[int, ...], convs: Sequence[Any]) -> tuple[int, ...]:
    """Return the shape of the result of convolutions of an input of this shape."""
    for conv in convs:
        geometry = Geometry(_pair(conv.stride), _pair(conv.padding), _pair(conv.dilation))
        shape = geometry.output_shape(shape, conv.weight.shape)
    return shape


class PreActBasicBlock(PreActBlock):
    """y = S(x) + conv2(act(bn2(conv1(act(bn1(x)))))) with two 3x3 convolutions; nothing stands on the shortcut.

    So x_L = x_l + ΣF over the blocks between them, and dL/dx_l = dL/dx_L·(1 + …), exactly (equations 4 and 5 of the
    paper). See PreActBlock for what runs and what is saved.

    Shape: x (N, inplanes, H, W) to (N, planes, ceil(H / stride), ceil(W / stride)), any floating-point dtype of torch
    that convolutions have; channels_last is the fast format.

    Args:
        downsample: see PreActBlock; it is needed where stride or planes change the shape.
        activation: None is nn.ReLU().

    Source: He et al. 2016, Identity Mappings in Deep Residual Networks, https://arxiv.org/abs/1603.05027, figure 4 (e).
    """

    depth = 2

    def __init__(
        self,
        inplanes: int,
        planes: int,
        stride: int = 1,
        downsample: nn.Module | None = None,
        activation: nn.Module | None = None,
    ) -> None:
        super().__init__(activation, downsample)
        self.bn1, self.conv1 = nn.BatchNorm2d(inplanes), nn.Conv2d(inplanes, planes, 3, stride, 1, bias=False)
        self.bn2, self.conv2 = nn.BatchNorm2d(planes), nn.Conv2d(planes, planes, 3, 1, 1, bias=False)


class PreActBottleneck(PreActBlock):
    """y = S(x) + conv3(act(bn3(conv2(act(bn2(conv1(act(bn1(x)))))))) with 1x1, 3x3 (stride) and 1x1 convolutions.

    See PreActBasicBlock. The result has expansion·planes channels.

    Source: He et al. 2016, Identity Mappings in Deep Residual Networks, https://arxiv.org/abs/1603.05027.
    """

    depth = 3
    expansion = 4

    def __init__(
        self,
        inplanes: int,
        planes: int,
        stride: int = 1,
        downsample: nn.Module | None = None,
        activation: nn.Module | None = None,
    ) -> None:
        super().__init__(activation, downsample)
        self.bn1, self.conv1 = nn.BatchNorm2d(inplanes), nn.Conv2d(inplanes, planes, 1, bias=False)
        self.bn2, self.conv2 = nn.BatchNorm2d(planes), nn.Conv2d(planes, planes, 3, stride, 1, bias=False)
        self.bn3, self.conv3 = nn.BatchNorm2d(planes), nn.Conv2d(planes, planes * self.expansion, 1, bias=False)
