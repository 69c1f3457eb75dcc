"""Residuals of any branch that are scaled before the add: ReZero, SkipInit, LayerScale and stochastic depth."""

from __future__ import annotations

import torch
from torch import Tensor, fx, nn

from fusedres.modules.branch import run_branch
from fusedres.modules.stochastic_depth import check_rate, draw_survivors
from fusedres.modules.tail import ResidualTail
from fusedres.modules.tail_running import TailModules, run


class ScaledResidual(nn.Module):
    """y = x + scale⊙F(x), or x + scale⊙norm(F(x)), with a learnt scale: what ReZero, SkipInit and LayerScale share.

    Scale, norm and add are one pass forward; backward one pass for the sums and one for the gradients. In a branch that
    is an nn.Sequential, a norm, an activation and the convolution after them run as NormActConv.

    Shape: x (N, C, H, W), or (N, C), to the same; branch keeps the shape.

    Args:
        branch: F.
        shape: of the scale: () or (C,).
        initial: value of the scale at the start.
        norm: nn.BatchNorm2d of the branch's result (nn.BatchNorm1d for (N, C)).

    Raises: ValueError where the branch changes the shape, or the scale does not fit it.
    """

    def __init__(
        self, branch: nn.Module, shape: tuple[int, ...], initial: float, norm: nn.Module | None = None
    ) -> None:
        super().__init__()
        self.branch = branch
        self.scale = nn.Parameter(torch.full(shape, float(initial)))
        self.tail = ResidualTail(norm)

    def forward(self, x: Tensor) -> Tensor:
        """Return the result; see the class."""
        result: Tensor
        traced = isinstance(x, fx.Proxy)
        if traced:  # the number of dimensions is not known
            h = self.branch(x) if self.tail.norm is None else self.tail.norm(self.branch(x))
            result = x + (h.transpose(1, -1) * self.scale.to(h.dtype)).transpose(1, -1)
            return result
        result = self.tail(run_branch(type(self).__name__, "branch", self.branch, x), x, self.scale)
        return result


class ReZero(ScaledResidual):
    """y = x + α·F(x) with one learnt number α, which is 0 at the start; see ScaledResidual.

    Source: Bachlechner et al. 2020, ReZero is All You Need, https://arxiv.org/abs/2003.04887.
    """

    def __init__(self, branch: nn.Module, norm: nn.Module | None = None) -> None:
        super().__init__(branch, (), 0.0, norm)


class SkipInit(ScaledResidual):
    """y = x + α·F(x) with one learnt number α, for networks without BatchNorm; see ScaledResidual.

    Args:
        initial: 0 in the paper's main experiments, or 1 / √(number of blocks).

    Source: De and Smith 2020, Batch Normalization Biases Residual Blocks Towards the Identity Function in Deep
    Networks, https://arxiv.org/abs/2002.10444.
    """

    def __init__(self, branch: nn.Module, initial: float = 0.0) -> None:
        super().__init__(branch, (), initial)


class LayerScale(ScaledResidual):
    """y = x + λ⊙F(x) with a learnt number for each channel, small at the start; see ScaledResidual.

    Args:
        initial: 0.1 up to a depth of 18, 1e-5 up to 24, and 1e-6 for deeper networks in the paper.

    Source: Touvron et al. 2021, Going Deeper with Image Transformers, https://arxiv.org/abs/2103.17239.
    """

    def __init__(self, branch: nn.Module, channels: int, initial: float = 1e-5, norm: nn.Module | None = None) -> None:
        super().__init__(branch, (channels,), initial, norm)


class StochasticDepth(nn.Module):
    """y = act(x + b/(1 − rate)·norm(F(x))) in training, b ∈ {0, 1} with P(b = 0) = rate; in eval act(x + norm(F(x))).

    Mode "row" draws b for each sample: F runs for all, as its BatchNorms need the batch. Mode "batch" draws one b for
    the batch, as in the paper; where it is 0, F does not run and the block costs nothing. Survivors are scaled in
    training, as in torchvision.ops.stochastic_depth; in the paper they are in eval. F runs as in ScaledResidual.

    Shape: x (N, C, H, W), or (N, C), to the same; branch keeps the shape.

    Args:
        branch: F.
        rate: of dropping, at least 0 and less than 1.
        mode: "row" or "batch".
        norm: nn.BatchNorm2d of the branch's result (nn.BatchNorm1d for (N, C)).
        activation: after the add; see ResidualTail.

    Raises:
        ValueError: rate or mode is none of these, or the branch changes the shape.

    Source: Huang et al. 2016, Deep Networks with Stochastic Depth, https://arxiv.org/abs/1603.09382.
    """

    def __init__(
        self,
        branch: nn.Module,
        rate: float,
        mode: str = "row",
        norm: nn.Module | None = None,
        activation: nn.Module | None = None,
    ) -> None:
        super().__init__()
        check_rate("StochasticDepth", rate, mode)
        self.branch, self.rate, self.mode = branch, rate, mode
        self.tail = ResidualTail(norm, activation=activation)

    def extra_repr(self) -> str:
        """Return the settings that are no modules."""
        return f"rate={self.rate}, mode={self.mode!r}"

    def forward(self, x: Tensor) -> Tensor:
        """Return the result; see the class."""
        if not self.training or self.rate == 0:
            result: Tensor = self.tail(self._branch(x), x)
            return result
        survivors = draw_survivors(x, self.rate, self.mode)
        activation = self.tail.activation
        if survivors is None:
            return x if activation is None else run(TailModules(None, None, activation, False), x)[0]
        result = self.tail(self._branch(x), x, survivors)
        return result

    def _branch(self, x: Tensor) -> Tensor:
        return run_branch(type(self).__name__, "branch", self.branch, x)
