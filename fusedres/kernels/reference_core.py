"""Pieces shared by the reference kernels: arithmetic type, per-channel broadcasting, packed masks."""

from __future__ import annotations

import torch
from torch import Tensor


def arithmetic_dtype(dtype: torch.dtype) -> torch.dtype:
    """float64 computes in float64, everything else in float32."""
    return torch.float64 if dtype is torch.float64 else torch.float32


def per_channel(vector: Tensor) -> Tensor:
    """(C,) as (1, C, 1, 1)."""
    return vector.view(1, -1, 1, 1)


def affine(x: Tensor, state: Tensor) -> Tensor:
    """scale·x + shift in the arithmetic type."""
    return x.to(state.dtype) * per_channel(state[2]) + per_channel(state[3])


def pack_bits(active: Tensor) -> Tensor:
    """(N, C, H, W) booleans as (N, H, W, ceil(C / 8)) bytes, lowest bit first."""
    rows = active.permute(0, 2, 3, 1)
    rows = torch.nn.functional.pad(rows.to(torch.uint8), (0, -rows.shape[-1] % 8))
    weights = torch.tensor([1 << bit for bit in range(8)], dtype=torch.uint8, device=active.device)
    return (rows.unflatten(-1, (-1, 8)) * weights).sum(-1, dtype=torch.uint8)


def unpack_bits(mask: Tensor, channels: int) -> Tensor:
    """The inverse of pack_bits."""
    shifts = torch.arange(8, dtype=torch.uint8, device=mask.device)
    bits = (mask.unsqueeze(-1) >> shifts) & 1
    return bits.flatten(-2)[..., :channels].to(torch.bool).permute(0, 3, 1, 2)


def masked(grad: Tensor, gate: Tensor | None) -> Tensor:
    """grad where the gate (packed bits or a ReLU's output) is open, else 0; NaN in the output lets it pass."""
    if gate is None:
        return grad
    closed = ~unpack_bits(gate, grad.shape[1]) if gate.dtype is torch.uint8 else gate <= 0
    return grad.masked_fill(closed, 0)
