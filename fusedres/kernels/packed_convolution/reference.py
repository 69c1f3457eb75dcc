"""Convolutions of packed weights in plain PyTorch: a packed weight is the scaled weight itself, as a vector."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor
from torch.nn import functional as F

from fusedres.values import Geometry


def pack_weight(weight: Tensor, dilation: Sequence[int], scale: Tensor | None) -> Tensor:
    """See fusedres.ops.packed_convolution."""
    return (weight if scale is None else weight * scale.view(-1, 1, 1, 1)).flatten().clone()


def packed_convolution_out(
    x: Tensor,
    panels: Tensor,
    bias: Tensor,
    kernel: Sequence[int],
    geometry: Geometry,
    shortcut: Tensor | None,
    with_relu: bool,
    out: Tensor,
) -> None:
    """See fusedres.ops.packed_convolution."""
    weight = panels.view(bias.shape[0], x.shape[1], *kernel)
    y = F.conv2d(x, weight, bias, list(geometry.stride), list(geometry.padding), list(geometry.dilation))
    if shortcut is not None:
        y = y + shortcut
    out.copy_(y.relu() if with_relu else y)
