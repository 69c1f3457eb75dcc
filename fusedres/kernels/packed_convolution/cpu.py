"""Convolutions of packed weights in C++ (csrc/packed_convolution)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fusedres import _C
from fusedres.kernels.arguments import address, convolution_map, weight_map
from fusedres.kernels.packed_convolution import packed_size
from fusedres.values import Geometry, Packed


def pack_weight(weight: Tensor, dilation: Sequence[int], scale: Tensor | None, winograd: bool) -> Tensor:
    """See fusedres.ops.packed_convolution."""
    panels = weight.new_empty(packed_size(weight.shape, winograd))
    _C.pack_weight(
        weight.data_ptr(),
        weight_map(weight.shape, dilation),
        weight.stride(),
        address(scale),
        panels.data_ptr(),
        torch.get_num_threads(),
        winograd,
    )
    return panels


def packed_convolution_out(
    x: Tensor,
    packed: Packed,
    geometry: Geometry,
    shortcut: Tensor | None,
    with_relu: bool,
    out: Tensor,
) -> None:
    """See fusedres.ops.packed_convolution."""
    _C.packed_convolution(
        x.data_ptr(),
        convolution_map(x.shape, (out.shape[1], x.shape[1], *packed.kernel), geometry),
        packed.panels.data_ptr(),
        packed.bias.data_ptr(),
        address(shortcut),
        with_relu,
        out.data_ptr(),
        torch.get_num_threads(),
        packed.winograd,
    )
