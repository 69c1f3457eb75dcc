"""Tile sizes of conv_dgrad's kernel, best guess first. None was timed."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache

import torch
from torch import Tensor

from fusedres.kernels.triton_core.launch import (
    INTERPRETED,
    Config,
    Gpu,
    ceil_div,
    choose,
    fitting,
    gpu,
    input_precision,
)


def candidates(grad: Tensor, weight: Tensor, stride: Sequence[int], on_load: bool) -> Sequence[Config]:
    """Return candidates for grad (N, K, P, Q) and weight (K, C, R, S); on_load: dy is formed in the kernel."""
    if INTERPRETED or grad.is_cpu:
        return _INTERPRETED
    k, c = (int(size) for size in weight.shape[:2])  # a weight's sizes are never symbolic
    return _candidates(grad.dtype, input_precision(grad.dtype), k, c, max(stride) > 1, on_load, gpu(grad.device))


@cache
def _candidates(
    dtype: torch.dtype, precision: str, k: int, c: int, strided: bool, on_load: bool, gpu: Gpu
) -> Sequence[Config]:
    def shared_bytes(config: Config) -> int:
        m, n, depth = (config[block] for block in ("BLOCK_M", "BLOCK_N", "BLOCK_K"))
        bits = m * depth // 8  # of the gate, loaded with grad and y
        return config.num_stages * (((2 * m if on_load else m) + n) * depth * dtype.itemsize + bits * on_load)

    return fitting(_tiles(dtype, precision, k, c, strided, on_load, gpu), shared_bytes, gpu)


def _tiles(
    dtype: torch.dtype, precision: str, k: int, c: int, strided: bool, on_load: bool, gpu: Gpu
) -> Sequence[Config]:
    if dtype is torch.float64:
        return _FLOAT64
    if k % 8 != 0 or c % 8 != 0:
        return _UNALIGNED
    if dtype is torch.float32:
        if precision == "ieee":
            return _FLOAT32
        if strided:
            return _TF32_STRIDED
        return _TF32_64 if c <= 64 else _TF32
    if on_load:
        if c <= 64:
            return _ON_LOAD_64
        if not gpu.has_wgmma:
            return _ON_LOAD_AMPERE
        return _ON_LOAD if c > 128 and k > 64 else _ON_LOAD_128
    if c <= 64:
        return _STORED_64 if gpu.has_wgmma else _STORED_AMPERE_64
    if not gpu.has_wgmma:
        return _STRIDED_AMPERE if strided else _STORED_AMPERE
    return _STRIDED if strided else _STORED


def chosen(
    configs: Sequence[Config],
    grad: Tensor,
    weight: Tensor,
    input_size: Sequence[int],
    stride: Sequence[int],
    on_load: bool,
) -> Config:
    """Return the config to launch conv_dgrad with."""
    n, c, h, w = input_size
    taps, load = f"{weight.shape[2]}x{weight.shape[3]}", "on-load" if on_load else "stored"
    return choose(configs, "conv_dgrad", grad.dtype, n * h * w, c, weight.shape[0], taps, stride[0], load)


def row_tiles(input_size: Sequence[int], stride: Sequence[int], config: Config) -> int:
    """Return the number of row tiles of a result (N, C, H, W). Every phase has as many as the largest one, (0, 0)."""
    n, _, h, w = input_size
    pixels = n * ceil_div(h, stride[0]) * ceil_div(w, stride[1])
    return stride[0] * stride[1] * ceil_div(pixels, config["BLOCK_M"])


def _config(block_m: int, block_n: int, block_k: int, slices: int, warps: int, stages: int) -> Config:
    return Config({"BLOCK_M": block_m, "BLOCK_N": block_n, "BLOCK_K": block_k, "SLICES": slices}, warps, stages)


_INTERPRETED = (_config(64, 64, 32, 4, 4, 1),)
_STORED = (
    _config(128, 128, 64, 4, 8, 3),
    _config(64, 128, 64, 4, 4, 3),
    _config(128, 128, 64, 4, 8, 4),
    _config(128, 128, 32, 4, 8, 4),
    _config(128, 256, 64, 4, 8, 3),
    _config(64, 256, 64, 4, 4, 3),
    _config(128, 64, 64, 2, 4, 3),
)
# With a stride, the phases take more registers: two programs of eight warps do not fit on a multiprocessor.
_STRIDED = (
    _config(64, 128, 64, 4, 4, 3),
    _config(128, 128, 64, 4, 8, 3),
    _config(128, 64, 64, 2, 4, 3),
    _config(128, 64, 64, 2, 8, 3),
)
# Without wgmma, BLOCK_N=128 with BLOCK_K=32, and any BLOCK_N=256, spill.
_STORED_AMPERE = (
    _config(128, 128, 64, 4, 8, 3),
    _config(64, 128, 64, 4, 4, 3),
    _config(128, 64, 64, 2, 8, 3),
    _config(64, 64, 64, 2, 4, 3),
)
# With a stride, the middle two of _STORED_AMPERE spill too, with Triton 3.6.
_STRIDED_AMPERE = (
    _config(128, 128, 64, 4, 8, 3),
    _config(128, 64, 32, 2, 8, 3),
    _config(64, 64, 64, 2, 4, 3),
    _config(64, 64, 32, 2, 4, 4),
)
_STORED_AMPERE_64 = (
    _config(128, 64, 64, 4, 4, 3),
    _config(64, 64, 64, 1, 4, 4),
    _config(128, 64, 64, 2, 8, 3),
    _config(64, 64, 32, 1, 4, 4),
)
_STORED_64 = (
    _config(128, 64, 64, 2, 4, 3),
    _config(64, 64, 64, 1, 4, 4),
    _config(128, 64, 64, 2, 8, 3),
    _config(256, 64, 64, 2, 8, 3),
)
# On load, the arithmetic runs once per column tile, so column tiles are as wide as the registers allow.
_ON_LOAD = (
    _config(64, 256, 64, 4, 4, 2),
    _config(64, 128, 64, 4, 4, 3),
    _config(128, 256, 64, 4, 8, 2),
    _config(128, 128, 64, 4, 8, 2),
    _config(128, 256, 32, 4, 8, 3),
)
_ON_LOAD_128 = (
    _config(64, 128, 64, 4, 4, 3),
    _config(64, 128, 64, 4, 4, 2),
    _config(128, 128, 64, 4, 8, 2),
    _config(128, 128, 32, 4, 8, 3),
)
_ON_LOAD_AMPERE = (
    _config(64, 128, 32, 4, 4, 3),
    _config(64, 64, 64, 2, 4, 2),
    _config(128, 128, 64, 4, 8, 2),
    _config(128, 128, 32, 4, 8, 3),
)
_ON_LOAD_64 = (
    _config(64, 64, 64, 2, 4, 3),
    _config(64, 64, 32, 2, 4, 4),
    _config(128, 64, 64, 2, 8, 2),
    _config(128, 64, 32, 2, 8, 3),
)
_TF32 = (
    _config(64, 128, 32, 4, 4, 3),
    _config(128, 128, 32, 4, 8, 3),
    _config(64, 128, 32, 4, 4, 2),
    _config(64, 64, 32, 2, 4, 3),
)
# With a stride, four warps with BLOCK_N=128 spill with Triton 3.6.
_TF32_STRIDED = (
    _config(64, 64, 32, 2, 4, 3),
    _config(128, 128, 32, 4, 8, 3),
    _config(64, 64, 32, 2, 4, 2),
    _config(128, 64, 32, 2, 8, 3),
)
_TF32_64 = (
    _config(64, 64, 32, 2, 4, 3),
    _config(128, 64, 32, 2, 8, 3),
    _config(64, 64, 32, 2, 4, 2),
    _config(128, 64, 32, 2, 4, 3),
)
# Each element is loaded alone, and reaches shared memory through registers.
_UNALIGNED = (
    _config(64, 64, 32, 2, 4, 2),
    _config(64, 32, 32, 1, 4, 2),
    _config(64, 64, 16, 2, 4, 2),
    _config(64, 32, 16, 1, 4, 3),
)
# Four warps: another kernel with a flat loop over taps computed wrong sums in eight (pytorch#173068).
_FLOAT32 = (
    _config(64, 64, 16, 2, 4, 3),
    _config(64, 64, 16, 2, 4, 2),
    _config(64, 32, 32, 1, 4, 2),
    _config(32, 64, 16, 2, 4, 3),
)
_FLOAT64 = (
    _config(64, 64, 16, 2, 4, 2),
    _config(64, 32, 16, 1, 4, 3),
    _config(32, 64, 16, 2, 4, 3),
    _config(32, 32, 16, 1, 4, 3),
)
