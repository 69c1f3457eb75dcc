"""z' = relu(scale·z + shift) − t, rounded to z's dtype: the one-pass tail's input, as its Triton kernels load it."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def pixel_offsets(row, M, P, Q, H, W, C: tl.constexpr, STRIDE: tl.constexpr):
    """Return the offsets (int64) in (N, H, W, C) of pixels `row` of the (N, P, Q) grid of every STRIDE-th pixel.

    Rows beyond M read the last row, so no load needs a mask for them. What they load is never stored.
    """
    row = tl.minimum(row, M - 1)
    if STRIDE == 1:
        pixel = row.to(tl.int64)
    else:
        line = row // Q
        image = line // P
        pixel = (image.to(tl.int64) * H + (line - image * P) * STRIDE) * W + (row - line * Q) * STRIDE
    return pixel * C


@triton.jit
def load_tile(x_ptr, offsets, columns, C: tl.constexpr, EVEN: tl.constexpr, CHANNEL_AXIS: tl.constexpr):
    """Load rows that start at offsets, with channels `columns` along CHANNEL_AXIS of the tile.

    Channels beyond C are 0. EVEN: no channel is beyond C.
    """
    pointers = x_ptr + tl.expand_dims(offsets, CHANNEL_AXIS) + tl.expand_dims(columns, 1 - CHANNEL_AXIS)
    if EVEN:
        tile = tl.load(pointers)
    else:
        tile = tl.load(pointers, mask=tl.expand_dims(columns < C, 1 - CHANNEL_AXIS), other=0)
    return tile


@triton.jit
def load_channels(vector_ptr, columns, C: tl.constexpr, EVEN: tl.constexpr, CHANNEL_AXIS: tl.constexpr):
    """Load a vector (C,) in a shape that broadcasts with a tile of load_tile."""
    if EVEN:
        vector = tl.load(vector_ptr + columns)
    else:
        vector = tl.load(vector_ptr + columns, mask=columns < C, other=0)
    return tl.expand_dims(vector, 1 - CHANNEL_AXIS)


@triton.jit
def load_activated(
    z_ptr, state_ptr, dtype, offsets, columns, C: tl.constexpr, EVEN: tl.constexpr, CHANNEL_AXIS: tl.constexpr
):
    """Return relu(scale·z + shift), or z if state is None, in dtype; NaN stays NaN, as in torch."""
    z = load_tile(z_ptr, offsets, columns, C, EVEN, CHANNEL_AXIS).to(dtype)
    if state_ptr is not None:
        scale = load_channels(state_ptr + 2 * C, columns, C, EVEN, CHANNEL_AXIS)
        shift = load_channels(state_ptr + 3 * C, columns, C, EVEN, CHANNEL_AXIS)
        z = scale * z + shift
        z = tl.where(z <= 0, 0.0, z)
    return z


@triton.jit
def load_centred(
    z_ptr, state_ptr, pivot_ptr, offsets, columns, C: tl.constexpr, EVEN: tl.constexpr, CHANNEL_AXIS: tl.constexpr
):
    """Return z' in z's dtype; 0 in channels beyond C."""
    dtype = pivot_ptr.dtype.element_ty
    z = load_activated(z_ptr, state_ptr, dtype, offsets, columns, C, EVEN, CHANNEL_AXIS)
    return (z - load_channels(pivot_ptr, columns, C, EVEN, CHANNEL_AXIS)).to(z_ptr.dtype.element_ty)


def grid_arguments(x: Tensor | None, stride: int, prefix: str = "") -> dict[str, int]:
    """Return the sizes of an activation and its stride as arguments of pixel_offsets; each name starts with prefix."""
    h, w = (0, 0) if x is None else x.shape[2:]
    return {f"{prefix}H": h, f"{prefix}W": w, f"{prefix}STRIDE": stride}
