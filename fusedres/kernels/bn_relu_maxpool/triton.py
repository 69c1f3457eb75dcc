"""Launchers of BatchNorm + ReLU + max-pool; the equations and the kernels are in triton_kernels.py."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fusedres.kernels.bn_backward.triton import coefficients_launch
from fusedres.kernels.bn_relu_maxpool import configs
from fusedres.kernels.bn_relu_maxpool.triton_kernels import (
    bn_relu_maxpool_apply_kernel,
    bn_relu_maxpool_kernel,
    bn_relu_maxpool_reduce_kernel,
)
from fusedres.kernels.bn_relu_maxpool.wgrad import bn_relu_maxpool_wgrad
from fusedres.kernels.triton_core.launch import ceil_div, choose, launch
from fusedres.values import BnBranch, NormState, Pooled

__all__ = [
    "bn_relu_maxpool",
    "bn_relu_maxpool_backward",
    "bn_relu_maxpool_backward_",
    "bn_relu_maxpool_reduce",
    "bn_relu_maxpool_wgrad",
]


def bn_relu_maxpool(x: Tensor, state: Tensor, with_argmax: bool) -> tuple[Tensor, Tensor]:
    """See fusedres.ops.bn_relu_maxpool."""
    n, c, h, w = x.shape
    out = torch.empty(
        (n, c, ceil_div(h, 2), ceil_div(w, 2)), dtype=x.dtype, device=x.device, memory_format=torch.channels_last
    )
    argmax = torch.empty_like(out, dtype=torch.uint8) if with_argmax else x.new_empty(0, dtype=torch.uint8)
    candidates = configs.windows(c)
    config = choose(candidates)
    arguments = {
        "x_ptr": x,
        "state_ptr": state,
        "out_ptr": out,
        "out_argmax_ptr": argmax if with_argmax else None,
        **_sizes(x),
    }
    grid = (configs.window_tiles(x, config) * ceil_div(c, config["BLOCK_C"]),)
    if n:
        launch(bn_relu_maxpool_kernel, grid, arguments, config, candidates)
    return out, argmax


def bn_relu_maxpool_backward(pooled: Pooled, x: BnBranch, with_sums: bool) -> tuple[Tensor, Tensor]:
    """See fusedres.ops.bn_relu_maxpool."""
    grad_x = torch.empty_like(x.x)
    return grad_x, _launch(pooled, x, with_sums, grad_x)


def bn_relu_maxpool_backward_(pooled: Pooled, x: BnBranch, with_sums: bool) -> Tensor:
    """See fusedres.ops.bn_relu_maxpool."""
    return _launch(pooled, x, with_sums, x.x)


def bn_relu_maxpool_reduce(pooled: Pooled, x: Tensor, state: Tensor) -> Tensor:
    """See fusedres.ops.bn_relu_maxpool."""
    grad, argmax = pooled
    c = x.shape[1]
    candidates = configs.reduction(c)
    config = choose(candidates)
    partials = state.new_empty((configs.reduction_partials(x), 2, c))
    arguments = {
        "grad_ptr": grad,
        "argmax_ptr": argmax,
        "x_ptr": x,
        "state_ptr": state,
        "out_ptr": partials,
        "tiles": configs.window_tiles(x, config),
        **_sizes(x),
    }
    grid = (partials.shape[0] * ceil_div(c, config["BLOCK_C"]),)
    launch(bn_relu_maxpool_reduce_kernel, grid, arguments, config, candidates)
    return partials


def _launch(pooled: Pooled, branch: BnBranch, with_sums: bool, grad_x: Tensor) -> Tensor:
    (grad, argmax), (x, state, batch_statistics) = pooled, branch
    n, c, h, w = x.shape
    sums = state.new_zeros((2, c)) if n == 0 else state.new_empty((2, c))
    if n == 0:
        return sums
    coefficients = state[2:]  # without sums and batch statistics, only a (the scale) is read
    if batch_statistics or with_sums:
        partials = bn_relu_maxpool_reduce(pooled, x, state)
        norm_state = NormState(state, batch_statistics)
        coefficients, _ = coefficients_launch(partials, n * h * w, norm_state, None, sums)
    candidates = configs.windows(c)
    config = choose(candidates)
    arguments = {
        "grad_ptr": grad,
        "argmax_ptr": argmax,
        "x_ptr": x if batch_statistics else None,
        "coefficients_ptr": coefficients,
        "out_ptr": grad_x,
        **_sizes(x),
    }
    grid = (configs.window_tiles(x, config) * ceil_div(c, config["BLOCK_C"]),)
    launch(bn_relu_maxpool_apply_kernel, grid, arguments, config, candidates)
    return sums


def _sizes(x: Tensor) -> dict[str, Any]:
    _, c, h, w = x.shape
    return {"H": h, "W": w, "P": ceil_div(h, 2), "Q": ceil_div(w, 2), "C": c}
