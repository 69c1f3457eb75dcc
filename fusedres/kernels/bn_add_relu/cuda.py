"""The tail of a residual block in CUDA (csrc/bn_add_relu)."""

from __future__ import annotations

import torch
from torch import Tensor

from fusedres.kernels.arguments import pixels_of
from fusedres.kernels.cuda_core import launch


def bn_add_relu(
    x: Tensor, state: Tensor, shortcut: Tensor, shortcut_state: Tensor | None, stride: int, with_mask: bool
) -> tuple[Tensor, Tensor]:
    """See fusedres.ops.bn_add_relu."""
    out = torch.empty_like(x, memory_format=torch.channels_last)
    return out, _launch(x, state, shortcut, shortcut_state, stride, with_mask, out)


def bn_add_relu_(
    x: Tensor, state: Tensor, shortcut: Tensor, shortcut_state: Tensor | None, stride: int, with_mask: bool
) -> Tensor:
    """See fusedres.ops.bn_add_relu."""
    return _launch(x, state, shortcut, shortcut_state, stride, with_mask, x)


def bn_add_relu_out(
    x: Tensor, state: Tensor, shortcut: Tensor, shortcut_state: Tensor | None, stride: int, out: Tensor
) -> None:
    """See fusedres.ops.bn_add_relu."""
    _launch(x, state, shortcut, shortcut_state, stride, False, out)


def _launch(
    x: Tensor,
    state: Tensor,
    shortcut: Tensor,
    shortcut_state: Tensor | None,
    stride: int,
    with_mask: bool,
    out: Tensor,
) -> Tensor:
    n, channels, h, w = x.shape
    mask_shape = (n, h, w, (channels + 7) // 8) if with_mask else (0,)
    mask = torch.empty(mask_shape, dtype=torch.uint8, device=x.device)
    launch(
        "bn_add_relu",
        x.device,
        x,
        channels,
        state,
        pixels_of(shortcut, stride),
        shortcut_state,
        out,
        mask if with_mask else None,
    )
    return mask
