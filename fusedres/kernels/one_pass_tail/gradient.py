"""The gradient after the one-pass tail's ReLU, as its backward kernels load it."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def load_d(grad_ptr, gate_ptr, rows, first, M, K: tl.constexpr, BLOCK_K: tl.constexpr, CHANNEL_AXIS: tl.constexpr):
    """Load grad (M, K) from channel `first` on where the packed bits (M, ceil(K / 8)) are open; else, and outside, 0.

    Without gate_ptr all are open. A byte is loaded once for 8 channels. Channels lie along CHANNEL_AXIS of the tile.
    """
    width: tl.constexpr = (K + 7) // 8
    k = tl.expand_dims(first + tl.arange(0, BLOCK_K), 1 - CHANNEL_AXIS)
    bytes_ = tl.expand_dims(first // 8 + tl.arange(0, BLOCK_K // 8), 1 - CHANNEL_AXIS)
    rows = tl.expand_dims(rows, CHANNEL_AXIS)
    inside = rows < M
    wide = rows.to(tl.int64)
    fits: tl.constexpr = K % BLOCK_K == 0
    d = tl.load(grad_ptr + wide * K + k, mask=inside if fits else inside & (k < K), other=0)
    if gate_ptr is not None:
        of_row = inside if fits else inside & (bytes_ < width)
        packed = tl.load(gate_ptr + wide * width + bytes_, mask=of_row, other=0)
        if CHANNEL_AXIS == 1:
            bits = packed[:, :, None].to(tl.int32) >> tl.arange(0, 8)[None, None, :]
        else:
            bits = packed[:, None, :].to(tl.int32) >> tl.arange(0, 8)[None, :, None]
        d = tl.where(tl.reshape(bits, d.shape) & 1 == 0, 0.0, d).to(d.dtype)
    return d
