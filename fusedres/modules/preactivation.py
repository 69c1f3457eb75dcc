"""Pre-activation residual blocks: BatchNorm and activation stand before each convolution, and nothing after the add."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F

from fusedres.modules.calls import keep_reason
from fusedres.modules.composed_block import ComposedBlock
from fusedres.modules.norm_act_conv import Named, run_unit, standing_reason
from fusedres.modules.tail_running import TailModules, run


class PreActBlock(ComposedBlock):
    """y = S(x) + F(x) with F = conv_n(act(bn_n(… conv_1(act(bn_1(x)))))): what the pre-activation blocks share.

    Each convolution with the BatchNorm and activation before it is a step as in NormActConv, and its result takes the
    shortcut in place. Saved for backward are x and the results of all convolutions but the last: half of what torch
    saves.

    A downsample that is an nn.Conv2d reads act(bn_1(x)), as in the paper; another module, such as ZeroPadShortcut,
    reads x; None is the identity.

    Raises:
        ValueError, TypeError, RuntimeError: wrong channels, shape, dtype or device of x.
    """

    def forward(self, x: Tensor) -> Tensor:
        """Return the block's output; see the class."""
        op = type(self).__name__
        self.check_shortcut(x, self.downsample)
        reasons: list[str | None] = []
        h, shortcut = x, x
        for index, (norm, convs) in enumerate(self._units()):
            found, reason = self._step(op, h, norm, convs, carries=index == 0 and self.downsample is None)
            reasons.append(reason)
            h = found[0]
            if len(found) == 2:
                shortcut = found[1]
            elif index == 0:
                shortcut = self.downsample(x)  # type: ignore[misc]
        first = next((reason for reason in reasons if reason is not None), None)
        keep_reason(self, first or "")
        if first is None and h.dtype is shortcut.dtype and h.shape == shortcut.shape:
            return h.add_(shortcut)
        return h + shortcut

    def _step(
        self, op: str, h: Tensor, norm: Named, convs: dict[str, nn.Module], carries: bool
    ) -> tuple[tuple[Tensor, ...], str | None]:
        """Return the results of one step, see run_unit, and why torch's own operators ran."""
        return run_unit(op, h, norm, self.activation, convs, carries)

    def standing_reason(self) -> str | None:
        """Return why no input runs fused, or None."""
        found = (standing_reason(norm, self.activation, convs) for norm, convs in self._units())
        return next((reason for reason in found if reason is not None), None)

    def _units(self) -> list[tuple[tuple[str, nn.Module], dict[str, nn.Module]]]:
        """Return each BatchNorm with the convolutions that read it."""
        units = [(self.norm(index), self.conv(index)) for index in range(1, self.depth + 1)]
        if isinstance(self.downsample, nn.Conv2d):
            units[0][1]["downsample"] = self.downsample
        return units


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


class WideBlock(PreActBasicBlock):
    """PreActBasicBlock with dropout between act(bn2) and conv2, as wide residual networks have it.

    With a dropout rate above 0, act(bn2(…)) is written in training, and dropout reads it.

    Args:
        dropout: rate of zeros, at least 0 and less than 1.

    Raises: ValueError: the rate is none.

    Source: Zagoruyko and Komodakis 2016, Wide Residual Networks, https://arxiv.org/abs/1605.07146, figure 1 (d).
    """

    def __init__(
        self,
        inplanes: int,
        planes: int,
        stride: int = 1,
        downsample: nn.Module | None = None,
        dropout: float = 0.0,
    ) -> None:
        super().__init__(inplanes, planes, stride, downsample)
        if not 0 <= dropout < 1:
            raise ValueError(f"WideBlock: dropout must be at least 0 and less than 1, got {dropout!r}")
        self.dropout = dropout

    def extra_repr(self) -> str:
        """Return the settings that are no modules."""
        return f"dropout={self.dropout}"

    def _step(
        self, op: str, h: Tensor, norm: Named, convs: dict[str, nn.Module], carries: bool
    ) -> tuple[tuple[Tensor, ...], str | None]:
        if not self.training or self.dropout == 0 or "conv2" not in convs:
            return super()._step(op, h, norm, convs, carries)
        tail = TailModules(norm[1], None, self.activation, False, "scale", (norm[0], "", "activation"))
        h, reason = run(tail, h)
        found, other = run_unit(op, F.dropout(h, self.dropout), None, None, convs)
        return found, reason or other


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
