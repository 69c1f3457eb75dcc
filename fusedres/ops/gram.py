"""Gram matrix and column sums of an activation: the statistics of any 1x1 convolution of it, before it runs."""

from __future__ import annotations

import torch
from torch import Tensor

from fusedres.ops import _checks
from fusedres.ops._library import Op


def _check_gram(x: Tensor, state: Tensor | None, stride: int, backend: str) -> None:
    _checks.activation("gram", "x", x, backend)
    if state is not None:
        _checks.state("gram", "state", state, x)
    _checks.positive_stride("gram", stride)
    if x.numel() == 0:
        raise ValueError(f"gram: x must have at least one value a channel, got shape {tuple(x.shape)}")


def _fake(x: Tensor, state: Tensor | None, stride: int, backend: str) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    n, c, h, w = x.shape
    shape = (n, c, _checks.subsampled(h, stride), _checks.subsampled(w, stride))
    out = torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=torch.channels_last)
    vector = x.new_empty(c, dtype=_checks.arithmetic_dtype(x))
    return out, vector, vector.new_empty(c, dtype=torch.float64), vector.new_empty((c, c), dtype=torch.float64)


GRAM = Op(
    "gram(Tensor x, Tensor? state, int stride, str backend) -> (Tensor, Tensor, Tensor, Tensor)",
    "gram",
    _check_gram,
    _fake,
)


def gram(x: Tensor, state: Tensor | None, backend: str, stride: int = 1) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """z = relu(scale·x + shift), centred on a pivot t per channel, with s = Σ(z − t) and G = Σ(z − t)(z − t)ᵀ.

    Args:
        x: (N, C, H, W), channels_last; float32, float64, bfloat16 or float16; not empty.
        state: (4, C) of bn_statistics or bn_frozen; None: z is x itself.
        backend: "reference" or "cpu".
        stride: every stride-th pixel in height and width is taken.

    Returns:
        z − t (N, C, ceil(H / stride), ceil(W / stride)) channels_last in x's dtype; t (C,), float64 for float64 x, else
        float32, the average of the first rows of z; s (C,) and G (C, C) in float64, those of z − t as stored (rounded).

    Raises:
        ValueError, TypeError, RuntimeError: a wrong shape or layout, dtype, or device.
    """
    out, pivot, total, matrix = GRAM(x, state, stride, backend)
    return out, pivot, total, matrix
