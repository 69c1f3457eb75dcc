"""Convolutions of packed weights in plain PyTorch: a packed weight is the scaled weight as a vector, and zeros."""

from __future__ import annotations

import math
from collections.abc import Sequence

from torch import Tensor
from torch.nn import functional as F

from fusedres.kernels.packed_convolution import packed_size
from fusedres.values import Geometry, Packed


def pack_weight(weight: Tensor, dilation: Sequence[int], scale: Tensor | None, winograd: bool) -> Tensor:
    """See fusedres.ops.packed_convolution."""
    panels = weight.new_zeros(packed_size(weight.shape, winograd))
    panels[: weight.numel()] = (weight if scale is None else weight * scale.view(-1, 1, 1, 1)).flatten()
    return panels


def packed_convolution_out(
    x: Tensor,
    packed: Packed,
    geometry: Geometry,
    shortcut: Tensor | None,
    with_relu: bool,
    out: Tensor,
) -> None:
    """See fusedres.ops.packed_convolution."""
    panels, bias, kernel, _ = packed
    shape = (bias.shape[0], x.shape[1], *kernel)
    weight = panels[: math.prod(shape)].view(shape)
    y = F.conv2d(x, weight, bias, list(geometry.stride), list(geometry.padding), list(geometry.dilation))
    if shortcut is not None:
        y = y + shortcut
    out.copy_(y.relu() if with_relu else y)
