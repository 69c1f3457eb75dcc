"""Highway layers: a gate, learnt for every element, blends a layer's output with its input."""

from __future__ import annotations

from torch import Tensor, nn

from fusedres.modules.branch import run_branch
from fusedres.modules.tail import ResidualTail


class Highway(nn.Module):
    """y = T⊙act(transform(x)) + (1 − T)⊙x with T = σ(gate(x)): a highway layer of any two layers that keep the shape.

    Both branches, the sigmoid and the blend are one pass forward; backward one pass for BatchNorm's sums, if there is a
    norm, and one for the gradients. Saved are x, the transform's output and the gate's logits.

    Args:
        transform, gate: modules from x (N, C, H, W), or (N, C), to tensors of the same shape.
        activation: see ResidualTail.
        norm: BatchNorm of the transform's output; None in the paper.

    Raises: ValueError where a layer changes the shape.

    Source: Srivastava, Greff and Schmidhuber 2015, Highway Networks, https://arxiv.org/abs/1505.00387.
    """

    def __init__(
        self,
        transform: nn.Module,
        gate: nn.Module,
        activation: nn.Module | None = None,
        norm: nn.Module | None = None,
    ) -> None:
        super().__init__()
        self.transform, self.gate = transform, gate
        activation = nn.ReLU() if activation is None else activation
        self.tail = ResidualTail(norm, activation=activation, before_add=True, gate="coupled")

    def forward(self, x: Tensor) -> Tensor:
        """Return the layer's output; see the class."""
        op = type(self).__name__
        transformed = run_branch(op, "transform", self.transform, x)
        result: Tensor = self.tail(transformed, x, run_branch(op, "gate", self.gate, x))
        return result


class HighwayLinear(Highway):
    """A fully connected highway layer of x (N, features).

    Args:
        gate_bias: of every gate at the start; the lower, the more of x is carried: −1 to −4 in the paper.
        activation: None is nn.ReLU().
    """

    def __init__(self, features: int, gate_bias: float = -2.0, activation: nn.Module | None = None) -> None:
        super().__init__(nn.Linear(features, features), nn.Linear(features, features), activation)
        nn.init.constant_(self.gate.bias, gate_bias)  # type: ignore[arg-type]


class HighwayConv2d(Highway):
    """A convolutional highway layer of x (N, channels, H, W).

    Args:
        kernel_size: odd, of both convolutions.
        gate_bias, activation: as in HighwayLinear.
        with_norm: BatchNorm after the transform's convolution, which has no bias then.
    """

    def __init__(
        self,
        channels: int,
        kernel_size: int = 3,
        gate_bias: float = -2.0,
        activation: nn.Module | None = None,
        with_norm: bool = False,
    ) -> None:
        if kernel_size < 1 or kernel_size % 2 == 0:
            raise ValueError(f"HighwayConv2d: kernel_size must be odd, to keep the image's size, got {kernel_size}")
        padding = kernel_size // 2
        super().__init__(
            nn.Conv2d(channels, channels, kernel_size, padding=padding, bias=not with_norm),
            nn.Conv2d(channels, channels, kernel_size, padding=padding),
            activation,
            nn.BatchNorm2d(channels) if with_norm else None,
        )
        nn.init.constant_(self.gate.bias, gate_bias)  # type: ignore[arg-type]
