"""Launchers of BatchNorm's backward; the equations and the kernels are in triton_kernels.py.

Functions named …_launch are more general than the ops: the caller chooses where results are written, and the gate may
be recomputed from x.
"""

from __future__ import annotations

from typing import NamedTuple

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
from fusedres.values import BnGradient, Gated, Gradient, NormState, Raw


def reduce_launch(gated: Gated, kind: str, x: Raw, shortcut: Raw | None) -> Tensor:
    """Return partials (T, 2 or 3, C) of the gradient after a gate of this kind."""
    (grad, gate), (y, state) = gated, x
    shortcut_x, shortcut_state = (None, None) if shortcut is None else shortcut
    assert state is not None  # checked by the op
    channels = y.shape[1]
    rows = y.numel() // channels
    candidates = configs.reduction(rows, channels, y.element_size())
    config = choose(candidates)
    tiles = ceil_div(rows, configs.row_tile(rows, channels))
    partials = state.new_empty((tiles, 2 if shortcut_x is None else 3, channels))
    arguments = {
        "grad_ptr": grad,
        "gate_ptr": gate,
        "x_ptr": y,
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


def bn_backward_reduce(gated: Gated, x: Raw, shortcut: Raw | None = None) -> Tensor:
    """See fusedres.ops.bn_backward."""
    return reduce_launch(gated, gate_kind(gated.gate), x, shortcut)


def coefficients_launch(
    partials: Tensor, count: int, norm_state: NormState, shortcut_state: NormState | None, sums: Tensor
) -> tuple[Tensor, Tensor | None]:
    """Return the coefficients of both branches, each (4, C); write the merged sums to the first rows of `sums`."""
    tiles, _, channels = partials.shape
    candidates = configs.merge(channels)
    config = choose(candidates)
    coefficients = torch.empty_like(norm_state.state)
    shortcut = None if shortcut_state is None else torch.empty_like(shortcut_state.state)
    arguments = {
        "partials_ptr": partials,
        "state_ptr": norm_state.state,
        "shortcut_state_ptr": None if shortcut_state is None else shortcut_state.state,
        "out_sums_ptr": sums,
        "out_ptr": coefficients,
        "out_shortcut_ptr": shortcut,
        "T": tiles,
        "C": channels,
        "count": count,
        "steps": loop_bound(ceil_div(tiles, config["BLOCK_T"])),
        "BATCH_STATISTICS": norm_state.batch_statistics,
        "SHORTCUT_BATCH_STATISTICS": shortcut_state is not None and shortcut_state.batch_statistics,
    }
    grid = (ceil_div(channels, config["BLOCK_C"]),)
    launch(bn_backward_coefficients_kernel, grid, arguments, config, candidates)
    return coefficients, shortcut


def bn_backward_coefficients(
    partials: Tensor, count: int, norm_state: NormState, shortcut_state: NormState | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """See fusedres.ops.bn_backward."""
    sums = partials.new_empty(partials.shape[1:])
    coefficients, shortcut = coefficients_launch(partials, count, norm_state, shortcut_state, sums)
    return sums, coefficients, coefficients.new_empty(0) if shortcut is None else shortcut


class Elementwise(NamedTuple):
    """A branch in the elementwise pass: its raw output (None if not needed), and the tensor for its gradient."""

    x: Tensor | None
    coefficients: Tensor
    out: Tensor  # may be x, or the gradient itself


def apply_launch(
    gated: Gated, kind: str, branch: Elementwise, shortcut: Elementwise | None = None, state: Tensor | None = None
) -> None:
    """Write the gradients of one or two branches; a gate of the kind "affine" is recomputed from x and the state."""
    (grad, gate), (x, coefficients, out) = gated, branch
    shortcut_x, shortcut_coefficients, shortcut_out = (None, None, None) if shortcut is None else shortcut
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


def bn_backward_apply(gradient: Gradient, shortcut: BnGradient | None = None) -> tuple[Tensor, Tensor]:
    """See fusedres.ops.bn_backward."""
    grad, gate, y, coefficients = gradient
    assert y is not None and coefficients is not None  # checked by the op
    grad_y, grad_shortcut = torch.empty_like(y), y.new_empty(0)
    second = None
    if shortcut is not None:
        grad_shortcut = torch.empty_like(shortcut.y)
        second = Elementwise(*shortcut, grad_shortcut)
    apply_launch(Gated(grad, gate), gate_kind(gate), Elementwise(y, coefficients, grad_y), second)
    return grad_y, grad_shortcut
