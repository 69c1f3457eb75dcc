"""The tail of a residual block in plain PyTorch."""

from __future__ import annotations

import torch
from torch import Tensor

from fusedres.kernels.reference_core import affine, pack_bits
from fusedres.values import ShortcutInput


def bn_add_relu(x: Tensor, state: Tensor, shortcut: ShortcutInput, with_mask: bool) -> tuple[Tensor, Tensor]:
    """See fusedres.ops.bn_add_relu."""
    branch = shortcut.x[:, :, :: shortcut.stride, :: shortcut.stride]
    if shortcut.state is not None:
        branch = affine(branch, shortcut.state)
    z = affine(x, state)
    z[:, : branch.shape[1]] += branch
    mask = pack_bits(~(z <= 0)) if with_mask else torch.empty(0, dtype=torch.uint8, device=x.device)
    return z.relu_().to(x.dtype).contiguous(memory_format=torch.channels_last), mask


def bn_add_relu_(x: Tensor, state: Tensor, shortcut: ShortcutInput, with_mask: bool) -> Tensor:
    """See fusedres.ops.bn_add_relu."""
    out, mask = bn_add_relu(x, state, shortcut, with_mask)
    x.copy_(out)
    return mask


def bn_add_relu_out(x: Tensor, state: Tensor, shortcut: ShortcutInput, out: Tensor) -> None:
    """See fusedres.ops.bn_add_relu."""
    out.copy_(bn_add_relu(x, state, shortcut, False)[0])
