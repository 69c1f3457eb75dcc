"""Convolutions without groups as torch's products of matrices, with a row for each pixel of the output.

csrc/residual_block/product.cpp does the same.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from fusedres.values import Geometry


def product(x: Tensor, weight: Tensor) -> Tensor:
    """Return conv(x) for a channels_last x, where each pixel of the output reads one pixel."""
    return _images(_rows(x) @ weight.flatten(1).T, x)


def input_gradient(grad: Tensor, weight: Tensor) -> Tensor:
    """Return the gradient of its input for a channels_last grad."""
    return _images(_rows(grad) @ weight.flatten(1), grad)


def weight_gradient(grad: Tensor, x: Tensor, weight: Tensor, geometry: Geometry) -> Tensor:
    """Return the gradient of any convolution's weight, in its layout, for a channels_last grad and x."""
    k, c, *kernel = weight.shape
    pixels = _rows(x) if geometry == _POINTWISE and kernel == [1, 1] else _gathered(x, kernel, geometry, grad.shape[2:])
    sums = (_rows(grad).T @ pixels).view(k, *kernel, c).permute(0, 3, 1, 2)
    return torch.empty_like(weight).copy_(sums)


_POINTWISE = Geometry((1, 1), (0, 0), (1, 1))


def _gathered(x: Tensor, kernel: list[int], geometry: Geometry, out: torch.Size) -> Tensor:
    """Return a row for each pixel of the output, with what each tap reads."""
    (top, left), (down, right), dilation = geometry.padding, geometry.stride, geometry.dilation
    padded = F.pad(x, (left, left, top, top))

    def read(row: int, column: int) -> Tensor:
        last_row, last_column = row + down * (out[0] - 1), column + right * (out[1] - 1)
        return padded[:, :, row : last_row + 1 : down, column : last_column + 1 : right].permute(0, 2, 3, 1)

    taps = [read(dilation[0] * r, dilation[1] * s) for r in range(kernel[0]) for s in range(kernel[1])]
    return torch.stack(taps, 3).flatten(0, 2).flatten(1)


def _rows(x: Tensor) -> Tensor:
    return x.permute(0, 2, 3, 1).flatten(0, 2)


def _images(rows: Tensor, like: Tensor) -> Tensor:
    n, _, h, w = like.shape
    return rows.view(n, h, w, -1).permute(0, 3, 1, 2)
