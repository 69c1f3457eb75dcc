"""Gradient of a convolution's input in Triton, fused with the BatchNorm backward before it and the step after it.

    dx[n, h, w, c] = Σ over r, s, k of dy[n, p, q, k]·weight[k, r, s, c],  p·stride + r·dilation − padding = h (q, s, w)

This is an implicit GEMM: rows are the input's pixels, and the reduction runs over taps and K in one flat loop. The same
taps, with the same shifts, reach all pixels of one phase (h mod stride, w mod stride). A program owns BLOCK_M pixels of
one phase and BLOCK_N channels, and runs over the taps of its phase only. So it never multiplies by an inserted zero
(those zeros: Dumoulin and Visin 2016, section 4). Channel tiles run fastest, then phases, so neighbouring programs
share their dy.

On load (1x1): dy = a·(d − c1 − (y − mean)·k), BatchNorm's backward (Ioffe and Szegedy 2015); d = grad after its gate.
On store: the ReLU of the layer before, recomputed from its raw output, with the two sums of that layer's BatchNorm; or
the shortcut's gradient is added. The tile is stored in SLICES column slices, which limits the registers.

Read: grad (with y and 1 bit per element) once per channel tile, weight once per row tile, and input or shortcut_grad
(with 1 bit per element). Written: the result, and, with input, 2 sums per channel and row tile.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from fusedres.kernels.conv_dgrad.configs import candidates, chosen, row_tiles
from fusedres.kernels.triton_core.gate import before_product
from fusedres.kernels.triton_core.launch import ceil_div, input_precision, jit_for_any_batch, launch
from fusedres.kernels.triton_core.product import add_product
from fusedres.values import Geometry, Gradient, Raw, ShortcutGradient, arithmetic_dtype


@triton.constexpr_function
def _first_tap(phase, padding, stride, dilation, size):
    """Return the smallest tap that reaches the pixels of a phase, size if none does."""
    for tap in range(size):
        if (phase + padding - tap * dilation) % stride == 0:
            return tap
    return size


@triton.constexpr_function
def _tap_step(stride, dilation):
    """Return the distance between two taps that reach the same pixels."""
    step = 1
    while step * dilation % stride:
        step += 1
    return step


@triton.constexpr_function
def _taps(first, size, step):
    return len(range(first, size, step))


@triton.jit
def _open(gate_ptr, rows, first_channel, mask, BYTES: tl.constexpr, ROW_BYTES: tl.constexpr):
    """Load packed bits of 8·BYTES channels of some rows, as 0 or 1; first_channel is a multiple of 8."""
    columns = first_channel // 8 + tl.arange(0, BYTES)
    packed = tl.load(gate_ptr + rows[:, None] * ROW_BYTES + columns, mask[:, None] & (columns < ROW_BYTES), other=0)
    bits = (packed[:, :, None] >> tl.arange(0, 8)) & 1
    return tl.reshape(bits, (rows.shape[0], 8 * BYTES))


@triton.jit
def _normalised_grad(grad, y, gate_ptr, coefficients_ptr, rows, row_ok, k, K: tl.constexpr, BLOCK_K: tl.constexpr):
    """Return dy = a·(d − c1 − (y − mean)·k) of one block, in grad's dtype; a is 0 beyond K."""
    channels = k + tl.arange(0, BLOCK_K)
    a = tl.load(coefficients_ptr + channels, channels < K, other=0)
    c1 = tl.load(coefficients_ptr + K + channels, channels < K, other=0)
    mean = tl.load(coefficients_ptr + 2 * K + channels, channels < K, other=0)
    slope = tl.load(coefficients_ptr + 3 * K + channels, channels < K, other=0)
    d = grad.to(a.dtype)
    if gate_ptr is not None:
        d = tl.where(_open(gate_ptr, rows, k, row_ok, BLOCK_K // 8, (K + 7) // 8) != 0, d, 0)
    return (a * (d - c1 - (y.to(a.dtype) - mean) * slope)).to(grad.dtype)


@triton.jit
def _accumulate(
    acc, grad_ptr, gate_ptr, y_ptr, coefficients_ptr, weight_ptr, base, row_ok, i, j, columns, P, Q,
    PHASE_H: tl.constexpr, PHASE_W: tl.constexpr, C: tl.constexpr, K: tl.constexpr, R: tl.constexpr, S: tl.constexpr,
    STRIDE_H: tl.constexpr, STRIDE_W: tl.constexpr, PAD_H: tl.constexpr, PAD_W: tl.constexpr,
    DILATION_H: tl.constexpr, DILATION_W: tl.constexpr, PRECISION: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Return acc + Σ over one phase's taps and K.

    base: rows of grad without a shift. A tap reads dy at (i + down, j + right).
    """
    FIRST_R: tl.constexpr = _first_tap(PHASE_H, PAD_H, STRIDE_H, DILATION_H, R)
    FIRST_S: tl.constexpr = _first_tap(PHASE_W, PAD_W, STRIDE_W, DILATION_W, S)
    STEP_R: tl.constexpr = _tap_step(STRIDE_H, DILATION_H)
    STEP_S: tl.constexpr = _tap_step(STRIDE_W, DILATION_W)
    TAPS_S: tl.constexpr = _taps(FIRST_S, S, STEP_S)
    TAPS: tl.constexpr = _taps(FIRST_R, R, STEP_R) * TAPS_S
    DOWN: tl.constexpr = (PHASE_H + PAD_H - FIRST_R * DILATION_H) // STRIDE_H
    RIGHT: tl.constexpr = (PHASE_W + PAD_W - FIRST_S * DILATION_W) // STRIDE_W
    BLOCKS: tl.constexpr = (K + BLOCK_K - 1) // BLOCK_K
    lanes = tl.arange(0, BLOCK_K)
    grad_offsets = base[:, None] * K + lanes[None, :]
    weight_offsets = lanes[:, None] * (R * S * C) + columns[None, :]
    if TAPS > 0:
        for step in range(TAPS * BLOCKS):
            tap, k = step // BLOCKS, step % BLOCKS * BLOCK_K
            down = DOWN - tap // TAPS_S * (STEP_R * DILATION_H // STRIDE_H)
            right = RIGHT - tap % TAPS_S * (STEP_S * DILATION_W // STRIDE_W)
            inside = row_ok
            if R * S > 1:  # the tap of a 1x1 is always inside dy, even with padding
                inside = inside & (i + down >= 0) & (i + down < P) & (j + right >= 0) & (j + right < Q)
            mask, weight_mask = inside[:, None], (columns < C)[None, :]
            if K % BLOCK_K != 0:
                mask, weight_mask = mask & (k + lanes < K)[None, :], weight_mask & (k + lanes < K)[:, None]
            shift = (down * Q + right) * K + k
            dy = tl.load(grad_ptr + shift + grad_offsets, mask, other=0)
            if y_ptr is not None:
                y = tl.load(y_ptr + shift + grad_offsets, mask, other=0)
                row = base + down * Q + right
                dy = _normalised_grad(dy, y, gate_ptr, coefficients_ptr, row, inside, k, K, BLOCK_K)
            tap_offset = (FIRST_R + tap // TAPS_S * STEP_R) * S + FIRST_S + tap % TAPS_S * STEP_S
            weight = tl.load(weight_ptr + (k * (R * S) + tap_offset) * C + weight_offsets, weight_mask, other=0)
            acc = add_product(acc, dy, weight, y_ptr is not None, PRECISION)
    return acc


@triton.jit
def _halves(x):
    """Return the left and the right half of the columns."""
    return tl.split(tl.permute(tl.reshape(x, (x.shape[0], 2, x.shape[1] // 2)), (0, 2, 1)))


@triton.jit
def _store(
    dx, column, tile, row_ok, rows, shortcut_ok, shortcut_rows, input_ptr, state_ptr, shortcut_ptr, shortcut_gate_ptr,
    out_ptr, out_partials_ptr, shortcut_channels, C: tl.constexpr,
):  # fmt: skip
    """Finish one column slice: add the shortcut's gradient, or apply the ReLU and store its two sums; round once."""
    columns = column + tl.arange(0, dx.shape[1])
    mask = row_ok[:, None] & (columns < C)[None, :]
    offsets = rows[:, None] * C + columns[None, :]
    if shortcut_ptr is not None:
        reached = mask & shortcut_ok[:, None]
        share = tl.load(shortcut_ptr + shortcut_rows[:, None] * shortcut_channels + columns[None, :], reached, other=0)
        if shortcut_gate_ptr is not None:
            row_bytes = (shortcut_channels + 7) // 8
            is_open = _open(shortcut_gate_ptr, shortcut_rows, column, shortcut_ok & row_ok, dx.shape[1] // 8, row_bytes)
            share = tl.where(is_open != 0, share, 0)
        dx += share.to(dx.dtype)
    if input_ptr is not None:
        x = tl.load(input_ptr + offsets, mask, other=0).to(dx.dtype)
        mean = tl.load(state_ptr + columns, columns < C, other=0)
        invstd = tl.load(state_ptr + C + columns, columns < C, other=0)
        scale = tl.load(state_ptr + 2 * C + columns, columns < C, other=0)
        shift = tl.load(state_ptr + 3 * C + columns, columns < C, other=0)
        dx = tl.where(scale * x + shift <= 0, 0, dx)  # NaN is open, as in torch
        d = tl.where(mask, dx.to(out_ptr.dtype.element_ty).to(dx.dtype), 0)
        partials = out_partials_ptr + tile * (2 * C) + columns
        tl.store(partials, tl.sum(d, 0), columns < C)
        tl.store(partials + C, tl.sum(d * ((x - mean) * invstd), 0), columns < C)
    tl.store(out_ptr + offsets, dx.to(out_ptr.dtype.element_ty), mask)


@jit_for_any_batch
def conv_dgrad_kernel(
    grad_ptr,  # (N, P, Q, K)
    gate_ptr,  # (N, P, Q, ceil(K / 8)) uint8, or None
    y_ptr,  # like grad, or None
    coefficients_ptr,  # (4, K) fp32 (fp64): a, c1, mean, k, or None
    weight_ptr,  # (K, R, S, C)
    input_ptr,  # like out, or None
    state_ptr,  # (4, C) fp32 (fp64): mean, invstd, scale, shift, or None
    shortcut_ptr,  # (N, ceil(H / SHORTCUT_STRIDE), ceil(W / SHORTCUT_STRIDE), shortcut_channels), or None
    shortcut_gate_ptr,  # (..., ceil(shortcut_channels / 8)) uint8, or None
    out_ptr,  # (N, H, W, C)
    out_partials_ptr,  # (T, 2, C) fp32 (fp64), or None
    N, H, W, P, Q, shortcut_channels,
    C: tl.constexpr, K: tl.constexpr, R: tl.constexpr, S: tl.constexpr,
    STRIDE_H: tl.constexpr, STRIDE_W: tl.constexpr, PAD_H: tl.constexpr, PAD_W: tl.constexpr,
    DILATION_H: tl.constexpr, DILATION_W: tl.constexpr, SHORTCUT_STRIDE: tl.constexpr,
    INDEX: tl.constexpr, ARITHMETIC: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, SLICES: tl.constexpr,
):  # fmt: skip
    """Compute one tile of BLOCK_M pixels of one phase by BLOCK_N channels."""
    COLUMN_TILES: tl.constexpr = (C + BLOCK_N - 1) // BLOCK_N
    tile, column = tl.program_id(0) // COLUMN_TILES, tl.program_id(0) % COLUMN_TILES * BLOCK_N
    phase = tile % (STRIDE_H * STRIDE_W)
    phase_h, phase_w = phase // STRIDE_W, phase % STRIDE_W
    phase_rows = tl.maximum((H - phase_h + STRIDE_H - 1) // STRIDE_H, 0)
    phase_columns = tl.maximum((W - phase_w + STRIDE_W - 1) // STRIDE_W, 0)
    pixel = (tile // (STRIDE_H * STRIDE_W)).to(INDEX) * BLOCK_M + tl.arange(0, BLOCK_M)
    row_ok = pixel < N * phase_rows * phase_columns
    image = pixel // tl.maximum(phase_rows * phase_columns, 1)
    i, j = pixel // tl.maximum(phase_columns, 1) % tl.maximum(phase_rows, 1), pixel % tl.maximum(phase_columns, 1)
    h, w = i * STRIDE_H + phase_h, j * STRIDE_W + phase_w
    rows, base = (image * H + h) * W + w, (image * P + i) * Q + j
    if STRIDE_H * STRIDE_W == 1:
        rows = pixel
        if R * S == 1 and PAD_H + PAD_W == 0:
            base = pixel

    acc = tl.zeros((BLOCK_M, BLOCK_N), ARITHMETIC)
    columns = column + tl.arange(0, BLOCK_N)
    for PHASE in tl.static_range(STRIDE_H * STRIDE_W):
        if phase == PHASE:
            acc = _accumulate(
                acc, grad_ptr, gate_ptr, y_ptr, coefficients_ptr, weight_ptr, base, row_ok, i, j, columns, P, Q,
                PHASE // STRIDE_W, PHASE % STRIDE_W, C, K, R, S,
                STRIDE_H, STRIDE_W, PAD_H, PAD_W, DILATION_H, DILATION_W, PRECISION, BLOCK_K,
            )  # fmt: skip

    shortcut_ok = (h % SHORTCUT_STRIDE == 0) & (w % SHORTCUT_STRIDE == 0)
    shortcut_h, shortcut_w = tl.cdiv(H, SHORTCUT_STRIDE), tl.cdiv(W, SHORTCUT_STRIDE)
    shortcut_rows = (image * shortcut_h + h // SHORTCUT_STRIDE) * shortcut_w + w // SHORTCUT_STRIDE
    if SHORTCUT_STRIDE == 1:
        shortcut_rows = rows
    if SLICES == 1:
        slices = (acc,)
    elif SLICES == 2:
        slices = _halves(acc)
    else:
        left, right = _halves(acc)
        slices = _halves(left) + _halves(right)
    for s in tl.static_range(SLICES):
        _store(
            slices[s], column + s * (BLOCK_N // SLICES), tile.to(INDEX), row_ok, rows, shortcut_ok, shortcut_rows,
            input_ptr, state_ptr, shortcut_ptr, shortcut_gate_ptr, out_ptr, out_partials_ptr, shortcut_channels, C,
        )  # fmt: skip


def conv_dgrad(
    gradient: Gradient,
    weight: Tensor,
    input_size: Sequence[int],
    geometry: Geometry,
    input: Raw | None = None,
    shortcut: ShortcutGradient | None = None,
) -> tuple[Tensor, Tensor]:
    """See fusedres.ops.conv_dgrad."""
    raw, input_state = (None, None) if input is None else input
    shortcut_grad, shortcut_gate, shortcut_stride = (None, None, 1) if shortcut is None else shortcut
    grad, gate, y, coefficients = gradient
    stride, padding, dilation = geometry
    n, c, h, w = input_size
    grad, gate = before_product(grad, gate)
    options = candidates(grad, weight, stride, y is not None)
    config = chosen(options, grad, weight, input_size, stride, y is not None)
    tiles = row_tiles(input_size, stride, config)
    arithmetic = arithmetic_dtype(grad.dtype)
    out = torch.empty((n, c, h, w), dtype=grad.dtype, device=grad.device, memory_format=torch.channels_last)
    partials = torch.empty((tiles, 2, c) if input is not None else 0, dtype=arithmetic, device=grad.device)
    tensors = [tensor for tensor in (grad, out, shortcut_grad, partials) if tensor is not None]
    wide = max(tensor.numel() for tensor in tensors) >= 2**31 - 2**20  # a tile may reach beyond the end
    arguments = {
        "grad_ptr": grad,
        "gate_ptr": gate,
        "y_ptr": y,
        "coefficients_ptr": coefficients,
        "weight_ptr": weight,
        "input_ptr": raw,
        "state_ptr": input_state,
        "shortcut_ptr": None if shortcut_grad is None else shortcut_grad[:, :c],
        "shortcut_gate_ptr": None if shortcut_gate is None else shortcut_gate[..., : ceil_div(c, 8)],
        "out_ptr": out,
        "out_partials_ptr": None if input is None else partials,
        "N": n,
        "H": h,
        "W": w,
        "P": grad.shape[2],
        "Q": grad.shape[3],
        "shortcut_channels": 0 if shortcut_grad is None else shortcut_grad.shape[1],
        "C": c,
        "K": weight.shape[0],
        "R": weight.shape[2],
        "S": weight.shape[3],
        "STRIDE_H": stride[0],
        "STRIDE_W": stride[1],
        "PAD_H": padding[0],
        "PAD_W": padding[1],
        "DILATION_H": dilation[0],
        "DILATION_W": dilation[1],
        "SHORTCUT_STRIDE": shortcut_stride,
        "INDEX": tl.int64 if wide else tl.int32,
        "ARITHMETIC": tl.float64 if arithmetic is torch.float64 else tl.float32,
        "PRECISION": input_precision(grad.dtype),
    }
    launch(conv_dgrad_kernel, (tiles * ceil_div(c, config["BLOCK_N"]),), arguments, config, options)
    return out, partials
