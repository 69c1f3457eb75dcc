"""The tail of a residual block in C++ (csrc/bn_add_relu)."""

from __future__ import annotations

import torch
from torch import Tensor

from fusedres import _C
from fusedres.kernels.arguments import address, pixels_of
from fusedres.kernels.cpu_core import empty_like
from fusedres.values import ShortcutInput, mask_shape


def bn_add_relu(x: Tensor, state: Tensor, shortcut: ShortcutInput, with_mask: bool) -> tuple[Tensor, Tensor]:
    """See fusedres.ops.bn_add_relu."""
    out = empty_like(x)
    return out, _launch(x, state, shortcut, with_mask, out)


def bn_add_relu_(x: Tensor, state: Tensor, shortcut: ShortcutInput, with_mask: bool) -> Tensor:
    """See fusedres.ops.bn_add_relu."""
    return _launch(x, state, shortcut, with_mask, x)


def bn_add_relu_out(x: Tensor, state: Tensor, shortcut: ShortcutInput, out: Tensor) -> None:
    """See fusedres.ops.bn_add_relu."""
    _launch(x, state, shortcut, False, out)


def _launch(x: Tensor, state: Tensor, shortcut: ShortcutInput, with_mask: bool, out: Tensor) -> Tensor:
    mask = x.new_empty(mask_shape(x) if with_mask else (0,), dtype=torch.uint8)
    _C.bn_add_relu(
        x.data_ptr(),
        x.shape[1],
        state.data_ptr(),
        pixels_of(shortcut.x, shortcut.stride),
        address(shortcut.state),
        out.data_ptr(),
        mask.data_ptr() if with_mask else 0,
        torch.get_num_threads(),
    )
    return mask
