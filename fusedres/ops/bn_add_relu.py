"""The tail of a residual block: BatchNorm's affine map, shortcut, ReLU, in one pass."""

from __future__ import annotations

import torch
from torch import Tensor

from fusedres.ops._arguments import Rows, activation, shortcut_input, wide
from fusedres.ops._library import op
from fusedres.values import ShortcutInput, mask_shape

_TAIL: Rows = {"x": activation("N C P Q"), "state": wide("4 C"), **shortcut_input("C")}


def _empty_mask(x: Tensor, with_mask: bool) -> Tensor:
    return x.new_empty(mask_shape(x) if with_mask else (0,), dtype=torch.uint8)


@op("bn_add_relu", _TAIL)
def bn_add_relu(
    x: Tensor, state: Tensor, shortcut: ShortcutInput, with_mask: bool = False, *, backend: str
) -> tuple[Tensor, Tensor]:
    """relu(scale·x + shift + S): the second half of a residual block (He et al. 2015).

    Returns:
        out like x; and the packed bits (N, P, Q, ceil(C / 8)) in uint8, set where NOT (out <= 0), channel 8k + j in bit
        j of byte k; an empty tensor without with_mask.
    """
    return torch.empty_like(x, memory_format=torch.channels_last), _empty_mask(x, with_mask)


@op("bn_add_relu", _TAIL, writes=("x",))
def bn_add_relu_(x: Tensor, state: Tensor, shortcut: ShortcutInput, with_mask: bool = False, *, backend: str) -> Tensor:
    """x = relu(scale·x + shift + S) in place; arguments and mask as in bn_add_relu. Returns the mask."""
    return _empty_mask(x, with_mask)


@op("bn_add_relu", {**_TAIL, "out": activation("N C P Q")}, writes=("out",))
def bn_add_relu_out(x: Tensor, state: Tensor, shortcut: ShortcutInput, out: Tensor, *, backend: str) -> None:
    """relu(scale·x + shift + S) into out, which is like x and not read; arguments as in bn_add_relu."""
