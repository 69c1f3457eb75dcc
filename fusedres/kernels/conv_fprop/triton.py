"""Convolutions as implicit GEMMs over channels_last memory, with BatchNorm on load and on store.

conv_fprop:        y = conv(h, weight), h = relu(scale·x + shift) or x, and each row tile's mean and squared deviations.
conv_bn_add_relu:  relu(scale·conv(x, weight) + shift + S); S is the shortcut.

Rows are the N·P·Q output pixels, columns are the K output channels, and the reduction runs over taps and input channels
(Chetlur et al. 2014, cuDNN). A program owns BLOCK_M rows, BLOCK_K columns and their whole reduction. Programs of the
same rows run side by side, so x comes from L2 after the first of them. The programs read x and weight (and the
shortcut), and write the output once.
"""

from __future__ import annotations

from typing import Any

import torch
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from fusedres.kernels.conv_fprop.accumulate import accumulate
from fusedres.kernels.conv_fprop.configs import DescriptorConfig, by_pointers, candidates, chosen
from fusedres.kernels.conv_fprop.descriptors import conv_fprop_descriptor_kernel
from fusedres.kernels.conv_fprop.taps import tap_table
from fusedres.kernels.triton_core.gemm import affine, below, column_slices, output_pixel, store
from fusedres.kernels.triton_core.launch import Config, ceil_div, choose, input_precision, jit_for_any_batch, launch
from fusedres.kernels.triton_core.rows import pixels, relu
from fusedres.values import Geometry, Raw, ShortcutInput, arithmetic_dtype


@jit_for_any_batch
def conv_fprop_kernel(
    x_ptr,  # (N, H, W, C), strides below
    weight_ptr,  # (K, R, S, C)
    state_ptr,  # (4, C) float32 or float64, or None
    table_ptr,  # (R·S, P·Q) float32, or None if no config has TABLE
    out_ptr,  # (N, P, Q, K)
    out_partials_ptr,  # (tiles, 2, K) float32 or float64, or None
    out_rows_ptr,  # (tiles,) like the partials, or None
    rows,
    H,
    W,
    P,
    Q,
    x_stride_n,
    x_stride_h,
    x_stride_w,
    stride_h,
    stride_w,
    padding_h,
    padding_w,
    dilation_h,
    dilation_w,
    C: tl.constexpr,
    K: tl.constexpr,
    R: tl.constexpr,
    S: tl.constexpr,
    PADDED: tl.constexpr,
    PRECISION: tl.constexpr,
    ACCUMULATOR: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_C: tl.constexpr,
    FLAT: tl.constexpr,
    TABLE: tl.constexpr,
):
    COLUMN_TILES: tl.constexpr = (K + BLOCK_K - 1) // BLOCK_K
    tile = tl.program_id(0) // COLUMN_TILES
    m = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    first_k = tl.program_id(0) % COLUMN_TILES * BLOCK_K
    k = first_k + tl.arange(0, BLOCK_K)
    acc = accumulate(
        x_ptr, weight_ptr, state_ptr, table_ptr, m, k, rows, H, W, P, Q, x_stride_n, x_stride_h, x_stride_w, stride_h,
        stride_w, padding_h, padding_w, dilation_h, dilation_w, C, K, R, S, PADDED, FLAT, TABLE, PRECISION, ACCUMULATOR,
        BLOCK_M, BLOCK_K, BLOCK_C,
    )  # fmt: skip
    store(acc, out_ptr, out_partials_ptr, out_rows_ptr, tile, first_k, rows, K, BLOCK_M, BLOCK_K)


@jit_for_any_batch
def conv_bn_add_relu_kernel(
    x_ptr,  # (N, H, W, C), strides below
    weight_ptr,  # (K, R, S, C)
    state_ptr,  # (4, K) float32 or float64
    shortcut_ptr,  # (N, P, Q, shortcut_channels), strides below, or None
    shortcut_state_ptr,  # (4, K) like state, or None
    out_ptr,  # (N, P, Q, K)
    rows,
    H,
    W,
    P,
    Q,
    x_stride_n,
    x_stride_h,
    x_stride_w,
    stride_h,
    stride_w,
    padding_h,
    padding_w,
    dilation_h,
    dilation_w,
    shortcut_channels,
    shortcut_stride_n,
    shortcut_stride_p,
    shortcut_stride_q,
    C: tl.constexpr,
    K: tl.constexpr,
    R: tl.constexpr,
    S: tl.constexpr,
    PADDED: tl.constexpr,
    PRECISION: tl.constexpr,
    ACCUMULATOR: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_C: tl.constexpr,
    FLAT: tl.constexpr,
    TABLE: tl.constexpr,
):
    COLUMN_TILES: tl.constexpr = (K + BLOCK_K - 1) // BLOCK_K
    m = tl.program_id(0) // COLUMN_TILES * BLOCK_M + tl.arange(0, BLOCK_M)
    first_k = tl.program_id(0) % COLUMN_TILES * BLOCK_K
    k = first_k + tl.arange(0, BLOCK_K)
    acc = accumulate(
        x_ptr, weight_ptr, None, None, m, k, rows, H, W, P, Q, x_stride_n, x_stride_h, x_stride_w, stride_h,
        stride_w, padding_h, padding_w, dilation_h, dilation_w, C, K, R, S, PADDED, FLAT, TABLE, PRECISION, ACCUMULATOR,
        BLOCK_M, BLOCK_K, BLOCK_C,
    )  # fmt: skip
    n, p, q = output_pixel(m, P, Q)
    pixel = n * shortcut_stride_n + p.to(tl.int64) * shortcut_stride_p + q.to(tl.int64) * shortcut_stride_q
    slices = column_slices(acc, 32)  # limits the registers
    for s in tl.static_range(len(slices)):
        k = first_k + s * 32 + tl.arange(0, 32)
        column_inside = below(k, K, BLOCK_K)[None, :]
        inside = (m < rows)[:, None] & column_inside
        z = affine(slices[s], state_ptr, k[None, :], column_inside, K)
        if shortcut_ptr is not None:
            reached = inside & (k < shortcut_channels)[None, :]
            shortcut = tl.load(shortcut_ptr + pixel[:, None] + k[None, :], mask=reached, other=0.0)
            if shortcut_state_ptr is not None:
                z += affine(shortcut, shortcut_state_ptr, k[None, :], column_inside, K)
            else:
                z += shortcut.to(ACCUMULATOR)
        tl.store(out_ptr + m.to(tl.int64)[:, None] * K + k[None, :], relu(z).to(out_ptr.dtype.element_ty), mask=inside)


def conv_fprop(x: Raw, weight: Tensor, geometry: Geometry, with_statistics: bool) -> tuple[Tensor, Tensor, Tensor]:
    """See fusedres.ops.conv_fprop."""
    source, state = x
    stride, padding = geometry.stride, geometry.padding
    y = empty_output(source, weight, geometry)
    rows, k = y.shape[0] * y.shape[2] * y.shape[3], y.shape[1]
    aligned = source.data_ptr() % 16 == 0 and weight.data_ptr() % 16 == 0
    configs = candidates(source, weight, y, stride, padding, state is not None, aligned)
    config = chosen(configs, source, weight, y, stride, state is not None)
    tiles = ceil_div(rows, config["BLOCK_M"])
    dtype = arithmetic_dtype(source.dtype)
    partials = torch.empty((tiles, 2, k) if with_statistics else (0,), dtype=dtype, device=source.device)
    tile_rows = torch.empty((tiles,) if with_statistics else (0,), dtype=dtype, device=source.device)
    by_table = isinstance(config, DescriptorConfig) or config["TABLE"]
    arguments = _convolution(source, weight, y, geometry) | {
        "state_ptr": state,
        "table_ptr": tap_table(source, weight, geometry) if by_table and any(padding) else None,
        "out_ptr": y,
        "out_partials_ptr": partials if with_statistics else None,
        "out_rows_ptr": tile_rows if with_statistics else None,
    }
    if isinstance(config, DescriptorConfig):
        launch(conv_fprop_descriptor_kernel, _grid(rows, k, config), _by_descriptors(arguments, config), config)
    else:
        launch(conv_fprop_kernel, _grid(rows, k, config), arguments, config, by_pointers(configs))
    return y, partials, tile_rows


def conv_bn_add_relu(
    x: Tensor, weight: Tensor, geometry: Geometry, state: Tensor, shortcut: ShortcutInput | None = None
) -> Tensor:
    """See fusedres.ops.conv_bn_add_relu."""
    stride, padding = geometry.stride, geometry.padding
    out = empty_output(x, weight, geometry)
    rows, k = out.shape[0] * out.shape[2] * out.shape[3], out.shape[1]
    configs = by_pointers(candidates(x, weight, out, stride, padding, False))
    taps = f"{weight.shape[2]}x{weight.shape[3]}"
    config = choose(configs, "conv_bn_add_relu", x.dtype, rows, weight.shape[1], k, taps, stride[0])
    reached, strides = (None, (0, 0, 0)) if shortcut is None else pixels(shortcut.x, shortcut.stride)
    arguments = _convolution(x, weight, out, geometry) | {
        "state_ptr": state,
        "shortcut_ptr": reached,
        "shortcut_state_ptr": None if shortcut is None else shortcut.state,
        "out_ptr": out,
        "shortcut_channels": 0 if reached is None else reached.shape[1],
        "shortcut_stride_n": strides[0],
        "shortcut_stride_p": strides[1],
        "shortcut_stride_q": strides[2],
    }
    launch(conv_bn_add_relu_kernel, _grid(rows, k, config), arguments, config, configs)
    return out


def _grid(rows: int, columns: int, config: Config) -> tuple[int]:
    return (ceil_div(rows, config["BLOCK_M"]) * ceil_div(columns, config["BLOCK_K"]),)


def empty_output(x: Tensor, weight: Tensor, geometry: Geometry) -> Tensor:
    """Return memory for a convolution's output, channels_last."""
    shape = geometry.output_shape(x.shape, weight.shape)
    return torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=torch.channels_last)


def _convolution(x: Tensor, weight: Tensor, y: Tensor, geometry: Geometry) -> dict[str, Any]:
    """Return the arguments of the reduction."""
    stride, padding, dilation = geometry
    k, c, r, s = weight.shape
    _, _, h, w = x.shape
    x_strides = (h * w * c, w * c, c)  # torch's may differ if a size is 1
    if r == s == 1 and not any(padding):  # a view of the pixels that are read
        x, x_strides = x[:, :, :: stride[0], :: stride[1]], (h * w * c, stride[0] * w * c, stride[1] * c)
        stride = (1, 1)
    return {
        "x_ptr": x,
        "weight_ptr": weight,
        "rows": y.shape[0] * y.shape[2] * y.shape[3],
        "H": x.shape[2],
        "W": x.shape[3],
        "P": y.shape[2],
        "Q": y.shape[3],
        "x_stride_n": x_strides[0],
        "x_stride_h": x_strides[1],
        "x_stride_w": x_strides[2],
        "stride_h": stride[0],
        "stride_w": stride[1],
        "padding_h": padding[0],
        "padding_w": padding[1],
        "dilation_h": dilation[0],
        "dilation_w": dilation[1],
        "C": c,
        "K": k,
        "R": r,
        "S": s,
        "PADDED": any(padding),
        "PRECISION": input_precision(x.dtype),
        "ACCUMULATOR": tl.float64 if x.dtype is torch.float64 else tl.float32,
    }


def _by_descriptors(arguments: dict[str, Any], config: Config) -> dict[str, Any]:
    """Return the same convolution's arguments for conv_fprop_descriptor_kernel."""
    x, weight, c = arguments["x_ptr"], arguments["weight_ptr"], arguments["C"]
    block_m, block_k, block_c = config["BLOCK_M"], config["BLOCK_K"], config["BLOCK_C"]
    kept = (
        "state_ptr table_ptr out_ptr out_partials_ptr out_rows_ptr rows W padding_h padding_w dilation_h dilation_w "
        "C K R S PRECISION"
    )
    return {name: arguments[name] for name in kept.split()} | {
        "x_descriptor": TensorDescriptor(x, [x.numel() // c, c], [c, 1], [block_m, block_c]),
        "weight_descriptor": TensorDescriptor(
            weight,
            [weight.shape[0], weight.numel() // weight.shape[0]],
            [weight.numel() // weight.shape[0], 1],
            [block_k, block_c],
        ),
        "pixels": arguments["H"] * arguments["W"],
    }
