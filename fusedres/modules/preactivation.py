"""Pre-activation residual blocks: BatchNorm and activation stand before each convolution, and nothing after the add."""

from __future__ import annotations

from itertools import pairwise

from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules import module as nn_module

from fusedres.modules.calls import keep_reason
from fusedres.modules.composed_block import ComposedBlock
from fusedres.modules.genuine import touched
from fusedres.modules.norm_act_conv import Named, Ready, add_before, run_unit, standing_reason
from fusedres.modules.tail_running import TailModules, run
from fusedres.ops.launch import direct


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
        return self.run(x, None, None)[0]

    def run(self, x: Tensor, ready: Ready | None, following: PreActBlock | None) -> tuple[Tensor, Ready | None]:
        """Return the block's output, and the first step of the block that follows if it was prepared with the add.

        Args:
            ready: this block's first step, if the block before it has prepared it.
        """
        if ready is None:  # else the block before it has checked it
            self.check_shortcut(x, self.downsample)
        reasons: list[str | None] = []
        h, shortcut = x, x
        for index, (norm, convs) in enumerate(self._units()):
            first = index == 0
            found, reason = self._step(h, norm, convs, first and self.downsample is None, ready if first else None)
            reasons.append(reason)
            h = found[0]
            if len(found) == 2:
                shortcut = found[1]
            elif first:
                shortcut = self.downsample(x)  # type: ignore[misc]
        unfused = next(filter(None, reasons), None)
        keep_reason(self, unfused or "")
        if unfused is not None or h.dtype is not shortcut.dtype or h.shape != shortcut.shape:
            return h + shortcut, None
        if not direct():  # a dispatch mode may have kept h, as selective checkpoints do
            return h + shortcut, None
        if following is None:
            return h.add_(shortcut), None
        following.check_shortcut(h, following.downsample)  # before its statistics are updated
        return add_before(type(following).__name__, h, shortcut, *following.opening())

    def opening(self) -> tuple[Named, nn.Module, dict[str, nn.Module]]:
        """Return the norm, the activation and the convolutions of the first step."""
        norm, convs = self._units()[0]
        return norm, self.activation, convs

    def _step(
        self, h: Tensor, norm: Named, convs: dict[str, nn.Module], carries: bool, ready: Ready | None
    ) -> tuple[tuple[Tensor, ...], str | None]:
        """Return the results of one step, see run_unit, and why torch's own operators ran."""
        return run_unit(type(self).__name__, h, norm, self.activation, convs, carries, ready)

    def standing_reason(self) -> str | None:
        """Return why no input runs fused, or None."""
        found = (standing_reason(norm, self.activation, convs) for norm, convs in self._units())
        return next(filter(None, found), None)

    def _units(self) -> list[tuple[tuple[str, nn.Module], dict[str, nn.Module]]]:
        """Return each BatchNorm with the convolutions that read it."""
        units = [(norm, dict([conv])) for norm, conv in zip(self.norms(), self.convs(), strict=True)]
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
        self, h: Tensor, norm: Named, convs: dict[str, nn.Module], carries: bool, ready: Ready | None
    ) -> tuple[tuple[Tensor, ...], str | None]:
        if not self.training or self.dropout == 0 or "conv2" not in convs:
            return super()._step(h, norm, convs, carries, ready)
        tail = TailModules(norm[1], None, self.activation, False, "scale", (norm[0], "", "activation"))
        h, reason = run(tail, h)
        found, other = run_unit(type(self).__name__, F.dropout(h, self.dropout), None, None, convs)
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


class PreActSequential(nn.Sequential):
    """Modules in a row, as nn.Sequential runs them; the add of a pre-activation block opens the next one.

    Between two of this package's pre-activation blocks the add, and the statistics of the BatchNorm that opens the
    second one, are one pass in training. A block with hooks is called as it is.

    Source: He et al. 2016, Identity Mappings in Deep Residual Networks, https://arxiv.org/abs/1603.05027.
    """

    def forward(self, x: Tensor) -> Tensor:
        """Return the last module's result."""
        ready: Ready | None = None
        modules: list[nn.Module | None] = [*self, None]
        for module, following in pairwise(modules):
            if isinstance(module, PreActBlock) and _may_be_run(module):
                joins = isinstance(following, PreActBlock) and _may_be_run(following) and module.training
                x, ready = module.run(x, ready, following if joins else None)  # type: ignore[arg-type]
            elif module is not None:
                x, ready = module(x), None
        return x


def _may_be_run(block: PreActBlock) -> bool:
    """Whether a block's run is what a call of it does."""
    hooked = touched("the block", block) is not None or nn_module._has_any_global_hook()
    plain = type(block).forward is PreActBlock.forward and type(block).run is PreActBlock.run
    return plain and not hooked and block._compiled_call_impl is None
