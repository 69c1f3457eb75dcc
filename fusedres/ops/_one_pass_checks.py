"""Checks that the ops of the one-pass tail share."""

from __future__ import annotations

import torch
from torch import Tensor

from fusedres.ops import _checks


def matrix_shape(op: str, conv_weight: Tensor) -> tuple[int, int]:
    """(K, C) of a 1x1 convolution's weight."""
    if conv_weight.dim() != 4 or conv_weight.shape[2:] != (1, 1):
        raise ValueError(
            f"{op}: conv_weight must have shape (K, C, 1, 1), got {tuple(conv_weight.shape)}; "
            "the one-pass tail is for 1x1 convolutions without groups"
        )
    if conv_weight.dtype not in _checks.FLOATING:
        raise TypeError(f"{op}: conv_weight must be float32, float64, bfloat16 or float16, got {conv_weight.dtype}")
    return conv_weight.shape[0], conv_weight.shape[1]


def positive_count(op: str, count: int) -> None:
    """Rows behind a sum."""
    if count < 1:
        raise ValueError(f"{op}: count must be at least 1, got {count}")


def wide_dtype(op: str, dtype: torch.dtype) -> torch.dtype:
    """The arithmetic dtype of activations of this dtype."""
    if dtype not in _checks.FLOATING:
        raise TypeError(f"{op}: dtype must be float32, float64, bfloat16 or float16, got {dtype}")
    return torch.float64 if dtype is torch.float64 else torch.float32


def grid(z: Tensor, stride: int) -> tuple[int, int, int]:
    """(N, P, Q) of every stride-th pixel."""
    n, _, h, w = z.shape
    return n, _checks.subsampled(h, stride), _checks.subsampled(w, stride)


def centred(op: str, prefix: str, z: Tensor, state: Tensor | None, pivot: Tensor, stride: int) -> None:
    """What z' is made of."""
    if state is not None:
        _checks.state(op, "state", state, z)
    _checks.dense(op, f"{prefix}pivot", pivot, (z.shape[1],), _checks.arithmetic_dtype(z), z)
    if stride < 1:
        raise ValueError(f"{op}: {prefix}stride must be at least 1, got {stride}")


def same_grid(op: str, name: str, got: tuple[int, ...], want: tuple[int, ...]) -> None:
    """Two operands' (N, P, Q)."""
    if got != want:
        raise ValueError(f"{op}: {name} must reach (N, P, Q) = {want} with its stride, got {got}")
