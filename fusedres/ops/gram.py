"""Gram matrix and column sums of an activation: the statistics of any 1x1 convolution of it, before it runs."""

from __future__ import annotations

import torch
from torch import Tensor

from fusedres.ops._arguments import Integer, Row, activation, wide
from fusedres.ops._library import Op
from fusedres.ops._sizes import arithmetic_dtype, subsampled

_ROWS: dict[str, Row] = {"x": activation("N C H W", empty=False), "state": wide("4 C"), "stride": Integer(1)}


def _fake(x: Tensor, state: Tensor | None, stride: int, backend: str) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    n, c, h, w = x.shape
    shape = (n, c, subsampled(h, stride), subsampled(w, stride))
    out = torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=torch.channels_last)
    return out, *_fake_statistics(x)


def _fake_statistics(x: Tensor, *_: object) -> tuple[Tensor, Tensor, Tensor]:
    c = x.shape[1]
    pivot = x.new_empty(c, dtype=arithmetic_dtype(x))
    return pivot, pivot.new_empty(c, dtype=torch.float64), pivot.new_empty((c, c), dtype=torch.float64)


GRAM = Op(
    "gram(Tensor x, Tensor? state, int stride, str backend) -> (Tensor, Tensor, Tensor, Tensor)",
    "gram",
    _ROWS,
    _fake,
)


def gram(x: Tensor, state: Tensor | None, backend: str, stride: int = 1) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """z = relu(scale·x + shift), centred on a pivot t per channel, with s = Σ(z − t) and G = Σ(z − t)(z − t)ᵀ.

    Args:
        x: (N, C, H, W), channels_last; float32, float64, bfloat16 or float16; not empty.
        state: (4, C) of bn_statistics or bn_frozen; None: z is x itself.
        backend: "reference", "cpu" or "triton".
        stride: every stride-th pixel in height and width is taken.

    Returns:
        z − t (N, C, ceil(H / stride), ceil(W / stride)) channels_last in x's dtype; t (C,), float64 for float64 x, else
        float32, the average of the first rows of z; s (C,) and G (C, C) in float64, those of z − t as stored (rounded).

    Raises:
        ValueError, TypeError, RuntimeError: a wrong shape or layout, dtype, or device.
    """
    out, pivot, total, matrix = GRAM(x, state, stride, backend)
    return out, pivot, total, matrix


GRAM_STATISTICS = Op(
    "gram_statistics(Tensor x, Tensor? state, int stride, str backend) -> (Tensor, Tensor, Tensor)",
    "gram",
    _ROWS,
    _fake_statistics,
)


def gram_statistics(x: Tensor, state: Tensor | None, backend: str, stride: int = 1) -> tuple[Tensor, Tensor, Tensor]:
    """t, s and G of gram, without writing z − t; backend "reference" or "triton", all else as in gram."""
    pivot, total, matrix = GRAM_STATISTICS(x, state, stride, backend)
    return pivot, total, matrix
