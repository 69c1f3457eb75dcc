"""Functions that the reference kernels share: per-channel broadcasting, packed masks."""

from __future__ import annotations

import torch
from torch import Tensor


def per_channel(vector: Tensor) -> Tensor:
    """Return (C,) as (1, C, 1, 1)."""
    return vector.view(1, -1, 1, 1)


def affine(x: Tensor, state: Tensor) -> Tensor:
    """Return scale·x + shift in the arithmetic type."""
    return x.to(state.dtype) * per_channel(state[2]) + per_channel(state[3])


def pack_bits(active: Tensor) -> Tensor:
    """Pack (N, C, H, W) booleans into (N, H, W, ceil(C / 8)) bytes, lowest bit first."""
    rows = active.permute(0, 2, 3, 1)
    rows = torch.nn.functional.pad(rows.to(torch.uint8), (0, -rows.shape[-1] % 8))
    weights = torch.tensor([1 << bit for bit in range(8)], dtype=torch.uint8, device=active.device)
    return (rows.unflatten(-1, (-1, 8)) * weights).sum(-1, dtype=torch.uint8)


def unpack_bits(mask: Tensor, channels: int) -> Tensor:
    """Undo pack_bits."""
    shifts = torch.arange(8, dtype=torch.uint8, device=mask.device)
    bits = (mask.unsqueeze(-1) >> shifts) & 1
    return bits.flatten(-2)[..., :channels].to(torch.bool).permute(0, 3, 1, 2)


def masked(grad: Tensor, gate: Tensor | None) -> Tensor:
    """Return grad where the gate (packed bits or a ReLU's output) is open, else 0; NaN in the output is open."""
    if gate is None:
        return grad
    closed = ~unpack_bits(gate, grad.shape[1]) if gate.dtype is torch.uint8 else gate <= 0
    return grad.masked_fill(closed, 0)
