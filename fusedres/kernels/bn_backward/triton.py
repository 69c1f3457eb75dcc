"""Launchers of BatchNorm's backward; the equations and the kernels are in triton_kernels.py.

Functions named …_launch leave open what the ops fix: where results are written, and a gate recomputed from x.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fusedres.kernels.bn_backward import configs
from fusedres.kernels.bn_backward.triton_kernels import (
    bn_backward_apply_kernel,
    bn_backward_coefficients_kernel,
    bn_backward_reduce_kernel,
)
from fusedres.kernels.triton_core.gate import gate_kind
from fusedres.kernels.triton_core.launch import ceil_div, choose, launch, loop_bound


def reduce_launch(
    grad: Tensor,
    gate: Tensor | None,
    x: Tensor,
    state: Tensor,
    shortcut_x: Tensor | None,
    shortcut_state: Tensor | None,
    kind: str,
) -> Tensor:
    """Partials (T, 2 or 3, C) behind a gate of this kind."""
    channels = x.shape[1]
    rows = x.numel() // channels
    candidates = configs.reduction(rows, channels, x.element_size())
    config = choose(candidates)
    tiles = ceil_div(rows, configs.row_tile(rows, channels))
    partials = state.new_empty((tiles, 2 if shortcut_x is None else 3, channels))
    arguments = {
        "grad_ptr": grad,
        "gate_ptr": gate,
        "x_ptr": x,
        "state_ptr": state,
        "shortcut_x_ptr": shortcut_x,
        "shortcut_state_ptr": None if shortcut_x is None else shortcut_state,
        "out_ptr": partials,
        "M": rows,
        "C": channels,
        "steps": loop_bound(configs.row_tile(rows, channels) // config["BLOCK_M"]),
        "GATE": kind,
    }
    grid = (tiles * ceil_div(channels, config["BLOCK_C"]),)
    launch(bn_backward_reduce_kernel, grid, arguments, config, candidates)
    return partials


def bn_backward_reduce(
    grad: Tensor,
    gate: Tensor | None,
    x: Tensor,
    state: Tensor,
    shortcut_x: Tensor | None,
    shortcut_state: Tensor | None,
) -> Tensor:
    """See fusedres.ops.bn_backward."""
    return reduce_launch(grad, gate, x, state, shortcut_x, shortcut_state, gate_kind(gate))


def coefficients_launch(
    partials: Tensor,
    count: int,
    state: Tensor,
    batch_statistics: bool,
    shortcut_state: Tensor | None,
    shortcut_batch_statistics: bool,
    sums: Tensor,
) -> tuple[Tensor, Tensor | None]:
    """Coefficients of both branches, each (4, C); the merged sums are written to the first rows of `sums`."""
    tiles, _, channels = partials.shape
    candidates = configs.merge(channels)
    config = choose(candidates)
    coefficients = torch.empty_like(state)
    shortcut = None if shortcut_state is None else torch.empty_like(shortcut_state)
    arguments = {
        "partials_ptr": partials,
        "state_ptr": state,
        "shortcut_state_ptr": shortcut_state,
        "out_sums_ptr": sums,
        "out_ptr": coefficients,
        "out_shortcut_ptr": shortcut,
        "T": tiles,
        "C": channels,
        "count": count,
        "steps": loop_bound(ceil_div(tiles, config["BLOCK_T"])),
        "BATCH_STATISTICS": batch_statistics,
        "SHORTCUT_BATCH_STATISTICS": shortcut_batch_statistics,
    }
    grid = (ceil_div(channels, config["BLOCK_C"]),)
    launch(bn_backward_coefficients_kernel, grid, arguments, config, candidates)
    return coefficients, shortcut


def bn_backward_coefficients(
    partials: Tensor,
    count: int,
    state: Tensor,
    batch_statistics: bool,
    shortcut_state: Tensor | None,
    shortcut_batch_statistics: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """See fusedres.ops.bn_backward."""
    sums = partials.new_empty(partials.shape[1:])
    coefficients, shortcut = coefficients_launch(
        partials, count, state, batch_statistics, shortcut_state, shortcut_batch_statistics, sums
    )
    return sums, coefficients, state.new_empty(0) if shortcut is None else shortcut


def apply_launch(
    grad: Tensor,
    gate: Tensor | None,
    x: Tensor | None,
    coefficients: Tensor,
    out: Tensor,
    kind: str,
    state: Tensor | None = None,
    shortcut_x: Tensor | None = None,
    shortcut_coefficients: Tensor | None = None,
    shortcut_out: Tensor | None = None,
) -> None:
    """Writes the gradients of the branches to `out` and `shortcut_out`, which may be x, shortcut_x or grad."""
    channels = grad.shape[1]
    rows = grad.numel() // channels
    candidates = configs.elementwise(channels, grad.element_size(), 1 if shortcut_out is None else 2)
    config = choose(candidates)
    arguments = {
        "grad_ptr": grad,
        "gate_ptr": gate,
        "x_ptr": x,
        "coefficients_ptr": coefficients,
        "state_ptr": state,
        "shortcut_x_ptr": shortcut_x,
        "shortcut_coefficients_ptr": shortcut_coefficients,
        "out_ptr": out,
        "out_shortcut_ptr": shortcut_out,
        "M": rows,
        "C": channels,
        "GATE": kind,
    }
    grid = (ceil_div(rows, config["BLOCK_M"]) * ceil_div(channels, config["BLOCK_C"]),)
    launch(bn_backward_apply_kernel, grid, arguments, config, candidates)


def bn_backward_apply(
    grad: Tensor,
    gate: Tensor | None,
    x: Tensor,
    coefficients: Tensor,
    shortcut_x: Tensor | None,
    shortcut_coefficients: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """See fusedres.ops.bn_backward."""
    grad_x = torch.empty_like(x)
    if shortcut_x is None:
        apply_launch(grad, gate, x, coefficients, grad_x, gate_kind(gate))
        return grad_x, x.new_empty(0)
    shortcut = shortcut_x, shortcut_coefficients, torch.empty_like(shortcut_x)
    apply_launch(grad, gate, x, coefficients, grad_x, gate_kind(gate), None, *shortcut)
    return grad_x, shortcut[2]
