"""Tile sizes of conv_dgrad's kernel, the best guess first; none has been timed."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fusedres.kernels.launch import INTERPRETED, Config, ceil_div, input_precision


def candidates(grad: Tensor, weight: Tensor, stride: Sequence[int], on_load: bool) -> tuple[Config, ...]:
    """For grad (N, K, P, Q) and weight (K, C, R, S); on_load: dy is formed in the kernel."""
    if INTERPRETED or grad.is_cpu:
        return (_config(64, 64, 32, 4, 4, 1),)
    if grad.dtype is torch.float64:
        return _FLOAT64
    k, channels = weight.shape[:2]
    if k % 8 != 0 or channels % 8 != 0:
        return _UNALIGNED
    if grad.dtype is torch.float32:
        if input_precision(grad.dtype) == "ieee":
            return _FLOAT32
        return _TF32_64 if channels <= 64 else _TF32
    if on_load:
        if channels <= 64:
            return _ON_LOAD_64
        return _ON_LOAD if channels > 128 and k > 64 and _has_wgmma(grad.device) else _ON_LOAD_128
    if channels <= 64:
        return _STORED_64
    return _STORED if max(stride) == 1 else _STRIDED


def row_tiles(input_size: Sequence[int], stride: Sequence[int], config: Config) -> int:
    """Row tiles of a result (N, C, H, W): as many for every phase as the largest one, (0, 0), has."""
    n, _, h, w = input_size
    pixels = n * ceil_div(h, stride[0]) * ceil_div(w, stride[1])
    return stride[0] * stride[1] * ceil_div(pixels, config["BLOCK_M"])


def _has_wgmma(device: torch.device) -> bool:
    """Whether the product takes few enough registers for 256 columns on load; off a GPU what an H100 has."""
    if device.type != "cuda" or not torch.cuda.is_available():
        return True
    return torch.cuda.get_device_capability(device)[0] == 9


def _config(block_m: int, block_n: int, block_k: int, slices: int, warps: int, stages: int) -> Config:
    return Config({"BLOCK_M": block_m, "BLOCK_N": block_n, "BLOCK_K": block_k, "SLICES": slices}, warps, stages)


_STORED = (
    _config(128, 128, 64, 4, 8, 3),
    _config(64, 128, 64, 4, 4, 3),
    _config(128, 128, 64, 4, 8, 4),
    _config(128, 128, 32, 4, 8, 4),
    _config(128, 256, 64, 4, 8, 3),
    _config(64, 256, 64, 4, 4, 3),
    _config(128, 64, 64, 2, 4, 3),
)
# The phases of a stride take more registers: two programs of eight warps do not fit on a multiprocessor.
_STRIDED = (
    _config(64, 128, 64, 4, 4, 3),
    _config(128, 128, 64, 4, 8, 3),
    _config(128, 64, 64, 2, 4, 3),
    _config(128, 128, 32, 4, 8, 4),
)
_STORED_64 = (
    _config(128, 64, 64, 2, 4, 3),
    _config(64, 64, 64, 1, 4, 4),
    _config(128, 64, 64, 2, 8, 3),
    _config(256, 64, 64, 2, 8, 3),
)
# On load the arithmetic runs once a column tile, so it is wide where the registers allow.
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
_TF32_64 = (
    _config(64, 64, 32, 2, 4, 3),
    _config(128, 64, 32, 2, 8, 3),
    _config(64, 64, 32, 2, 4, 2),
    _config(128, 64, 32, 2, 4, 3),
)
# Element by element from memory to shared memory, through registers.
_UNALIGNED = (
    _config(64, 64, 32, 2, 4, 2),
    _config(64, 32, 32, 1, 4, 2),
    _config(64, 64, 16, 2, 4, 2),
    _config(64, 32, 16, 1, 4, 3),
)
_FLOAT32 = (
    _config(64, 64, 32, 2, 4, 2),
    _config(64, 64, 16, 2, 4, 3),
    _config(128, 64, 16, 2, 8, 3),
    _config(64, 32, 32, 1, 4, 2),
)
_FLOAT64 = (
    _config(64, 64, 16, 2, 4, 2),
    _config(64, 32, 16, 1, 4, 3),
    _config(32, 64, 16, 2, 4, 3),
    _config(32, 32, 16, 1, 4, 3),
)
