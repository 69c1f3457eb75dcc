"""Residual blocks with the activation after the add, made of steps: with other gates and activations than ResNet's."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from fusedres.modules.calls import keep_reason
from fusedres.modules.composed_block import ComposedBlock
from fusedres.modules.genuine import touched
from fusedres.modules.norm_act_conv import Named, run_unit, standing_reason
from fusedres.modules.squeeze_excitation import Excitation
from fusedres.modules.tail_running import TailModules, reason_of_call, reason_of_modules, run_fused, run_unfused


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

    excitation_name = ""  # of the child that makes s, if there is one

    def forward(self, x: Tensor) -> Tensor:
        """Return the block's output; see the class."""
        ends = self._projection()
        self.check_shortcut(x, None if ends is None or len(ends[0]) else ends[1][1])
        op = type(self).__name__
        (h,), reason = run_unit(op, x, None, None, self.conv(1))
        reasons = [reason]
        for index in range(2, self.depth + 1):
            (h,), reason = run_unit(op, h, self.norm(index - 1), self.activation, self.conv(index))
            reasons.append(reason)
        shortcut = x
        if ends is not None:
            first, conv, _ = ends
            (shortcut,), reason = run_unit(op, first(x), None, None, dict([conv]))
            reasons.append(reason)
        elif self.downsample is not None:
            shortcut = self.downsample(x)
        tail = self._tail(ends)
        reasons.append(reason_of_call(tail, h, shortcut, None, None))
        keep_reason(self, next((reason for reason in reasons if reason is not None), ""))
        return (run_fused if reasons[-1] is None else run_unfused)(tail, h, shortcut)

    def standing_reason(self) -> str | None:
        """Return why no input runs fused, or None."""
        ends = self._projection()
        found = [standing_reason(None, None, self.conv(1))]
        for index in range(2, self.depth + 1):
            found.append(standing_reason(self.norm(index - 1), self.activation, self.conv(index)))
        if ends is not None:
            found.append(standing_reason(None, None, dict([ends[1]])))
        found.append(reason_of_modules(self._tail(ends), None, None))
        return next((reason for reason in found if reason is not None), None)

    def _projection(self) -> tuple[nn.Sequential, Named, Named] | None:
        """Return what the shortcut begins with, its last convolution, and that one's BatchNorm; None: neither."""
        downsample = self.downsample
        if type(downsample) is not nn.Sequential or touched("downsample", downsample) is not None:
            return None
        children = [(f"downsample.{name}", module) for name, module in downsample._modules.items()]
        if len(children) < 2 or not isinstance(children[-1][1], nn.BatchNorm2d) or children[-2][1] is None:
            return None
        return downsample[:-2], children[-2], children[-1]

    def _tail(self, ends: tuple[nn.Sequential, Named, Named] | None) -> TailModules:
        name, norm = self.norm(self.depth)
        shortcut_name, shortcut_norm = ("", None) if ends is None else ends[2]
        excitation: Any = getattr(self, self.excitation_name) if self.excitation_name else None
        names = (name, shortcut_name, "activation")
        return TailModules(norm, shortcut_norm, self.activation, False, "scale", names, excitation)


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
