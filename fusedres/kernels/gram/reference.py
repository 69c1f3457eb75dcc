"""Gram matrix in plain PyTorch."""

from __future__ import annotations

import torch
from torch import Tensor

from fusedres.kernels.reference_core import affine, per_channel
from fusedres.values import arithmetic_dtype


def gram(x: Tensor, state: Tensor | None, stride: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """See fusedres.ops.gram."""
    z = x[:, :, ::stride, ::stride]
    z = z.to(arithmetic_dtype(x.dtype)) if state is None else affine(z, state).relu_()
    pivot = z.permute(0, 2, 3, 1).reshape(-1, x.shape[1])[:8].mean(0)
    out = (z - per_channel(pivot)).to(x.dtype).contiguous(memory_format=torch.channels_last)
    rows = out.permute(0, 2, 3, 1).reshape(-1, x.shape[1]).double()
    return out, pivot, rows.sum(0), rows.T @ rows


def gram_statistics(x: Tensor, state: Tensor | None, stride: int) -> tuple[Tensor, Tensor, Tensor]:
    """See fusedres.ops.gram."""
    return gram(x, state, stride)[1:]
