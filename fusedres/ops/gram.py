"""Gram matrix and column sums of an activation: the statistics of any 1x1 convolution of it, before it runs."""

from __future__ import annotations

import torch
from torch import Tensor

from fusedres.ops._arguments import Integer, Rows, activation, wide
from fusedres.ops._library import op
from fusedres.ops._sizes import empty_activation
from fusedres.values import arithmetic_dtype, subsampled

_ROWS: Rows = {"x": activation("N C H W", empty=False), "state": wide("4 C"), "stride": Integer(1)}


@op("gram", _ROWS)
def gram(x: Tensor, state: Tensor | None, stride: int = 1, *, backend: str) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """z = relu(scale·x + shift), centred on a pivot t per channel, with s = Σ(z − t) and G = Σ(z − t)(z − t)ᵀ.

    Args:
        x: not empty.
        state: None: z is x itself.
        stride: every stride-th pixel in height and width is taken.

    Returns:
        z − t (N, C, ceil(H / stride), ceil(W / stride)), an activation in x's dtype; t (C,), float64 for float64 x,
        else float32, the average of the first rows of z; s (C,) and G (C, C) in float64, those of z − t as stored
        (rounded).
    """
    n, c, h, w = x.shape
    return empty_activation((n, c, subsampled(h, stride), subsampled(w, stride)), x), *_empty_statistics(x)


@op("gram", _ROWS)
def gram_statistics(x: Tensor, state: Tensor | None, stride: int = 1, *, backend: str) -> tuple[Tensor, Tensor, Tensor]:
    """t, s and G of gram, without writing z − t; all else as in gram."""
    return _empty_statistics(x)


def _empty_statistics(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    c = x.shape[1]
    pivot = x.new_empty(c, dtype=arithmetic_dtype(x.dtype))
    return pivot, pivot.new_empty(c, dtype=torch.float64), pivot.new_empty((c, c), dtype=torch.float64)
