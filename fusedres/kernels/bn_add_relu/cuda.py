"""The tail of a residual block in CUDA (csrc/bn_add_relu)."""

from __future__ import annotations

import torch
from torch import Tensor

from fusedres.kernels.arguments import pixels_of
from fusedres.kernels.cuda_core import launch
from fusedres.values import ShortcutInput, mask_shape


def bn_add_relu(x: Tensor, state: Tensor, shortcut: ShortcutInput, with_mask: bool) -> tuple[Tensor, Tensor]:
    """See fusedres.ops.bn_add_relu."""
    out = torch.empty_like(x, memory_format=torch.channels_last)
    return out, _launch(x, state, shortcut, with_mask, out)


def bn_add_relu_(x: Tensor, state: Tensor, shortcut: ShortcutInput, with_mask: bool) -> Tensor:
    """See fusedres.ops.bn_add_relu."""
    return _launch(x, state, shortcut, with_mask, x)


def bn_add_relu_out(x: Tensor, state: Tensor, shortcut: ShortcutInput, out: Tensor) -> None:
    """See fusedres.ops.bn_add_relu."""
    _launch(x, state, shortcut, False, out)


def _launch(x: Tensor, state: Tensor, shortcut: ShortcutInput, with_mask: bool, out: Tensor) -> Tensor:
    mask = torch.empty(mask_shape(x) if with_mask else (0,), dtype=torch.uint8, device=x.device)
    pixels, out_mask = pixels_of(shortcut.x, shortcut.stride), mask if with_mask else None
    launch("bn_add_relu", x.device, x, x.shape[1], state, pixels, shortcut.state, out, out_mask)
    return mask
