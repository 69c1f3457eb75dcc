"""Launchers of the gated residual tail; the kernels are in triton_kernels.py."""

from __future__ import annotations

from typing import Any

import torch
import triton.language as tl
from torch import Tensor

from fusedres.kernels.gated_tail import configs
from fusedres.kernels.gated_tail.triton_kernels import (
    gated_tail_apply_kernel,
    gated_tail_kernel,
    gated_tail_reduce_kernel,
)
from fusedres.kernels.triton_core.launch import Config, ceil_div, choose, launch, loop_bound
from fusedres.values import (
    TAIL_SUMS,
    Activation,
    Gated,
    TailCoefficients,
    TailNeeds,
    TailTerm,
    arithmetic_dtype,
    mask_shape,
    tail_groups,
)


def _stride(rows: Tensor | None) -> int:
    """Return the channels of what has a row for each sample, 0 for what all samples share."""
    return 0 if rows is None or rows.shape[0] == 1 else rows.shape[-1]


def _arguments(
    branch: TailTerm, shortcut: TailTerm | None, activation: Activation, coupled: bool, tile: int
) -> dict[str, Any]:
    """Return the arguments that all three kernels have; a program owns `tile` rows of a group."""
    x, state, factor, logits = branch
    s, s_state, s_factor, s_logits = shortcut or (None, None, None, None)
    n, c, h, w = x.shape
    rows = n * h * w // tail_groups(branch, shortcut)
    return {
        "x_ptr": x,
        "state_ptr": state,
        "factor_ptr": factor,
        "logits_ptr": logits,
        "shortcut_ptr": s,
        "shortcut_state_ptr": s_state,
        "shortcut_factor_ptr": s_factor,
        "shortcut_logits_ptr": s_logits,
        "slope_ptr": activation.slope,
        "rows": rows,
        "tiles": ceil_div(rows, tile),
        "C": c,
        "factor_stride": _stride(factor),
        "shortcut_factor_stride": _stride(s_factor),
        "KIND": activation.kind,
        "BEFORE_ADD": activation.before_add,
        "COUPLED": coupled,
        "DTYPE": tl.float64 if arithmetic_dtype(x.dtype) is torch.float64 else tl.float32,
    }


def _grid(arguments: dict[str, Any], x: Tensor, config: Config) -> tuple[int]:
    groups = ceil_div(x.numel() // x.shape[1], arguments["rows"])
    return (groups * arguments["tiles"] * ceil_div(x.shape[1], config["BLOCK_C"]),)


def gated_tail(
    branch: TailTerm, shortcut: TailTerm | None, activation: Activation, coupled: bool, with_mask: bool
) -> tuple[Tensor, Tensor]:
    """See fusedres.ops.gated_tail."""
    x = branch.x
    out = torch.empty_like(x, memory_format=torch.channels_last)
    mask = torch.empty(mask_shape(x) if with_mask else (0,), dtype=torch.uint8, device=x.device)
    _forward(branch, shortcut, activation, coupled, {"out_ptr": out, "out_mask_ptr": mask if with_mask else None})
    return out, mask


def gated_tail_(branch: TailTerm, shortcut: TailTerm | None, activation: Activation, coupled: bool) -> None:
    """See fusedres.ops.gated_tail."""
    _forward(branch, shortcut, activation, coupled, {"out_ptr": branch.x, "out_mask_ptr": None})


def _forward(
    branch: TailTerm,
    shortcut: TailTerm | None,
    activation: Activation,
    coupled: bool,
    results: dict[str, Tensor | None],
) -> None:
    candidates = configs.elementwise(branch.x.shape[1], branch.x.element_size())
    config = choose(candidates)
    arguments = _arguments(branch, shortcut, activation, coupled, config["BLOCK_M"])
    launch(gated_tail_kernel, _grid(arguments, branch.x, config), arguments | results, config, candidates)


def gated_tail_reduce(
    gated: Gated,
    branch: TailTerm,
    shortcut: TailTerm | None,
    activation: Activation,
    coupled: bool,
    with_slope: bool,
) -> Tensor:
    """See fusedres.ops.gated_tail."""
    x, groups = branch.x, tail_groups(branch, shortcut)
    rows, channels = x.numel() // x.shape[1], x.shape[1]
    tile = configs.row_tile(rows, groups, channels)
    candidates = configs.reduction(tile, channels, x.element_size())
    config = choose(candidates)
    arguments = _arguments(branch, shortcut, activation, coupled, tile)
    sums = x.new_zeros((groups, arguments["tiles"], TAIL_SUMS, channels), dtype=arithmetic_dtype(x.dtype))
    more = {
        "grad_ptr": gated.grad,
        "mask_ptr": gated.gate,
        "out_ptr": sums,
        "steps": loop_bound(tile // config["BLOCK_M"]),
        "WITH_SLOPE": with_slope,
    }
    launch(gated_tail_reduce_kernel, _grid(arguments, x, config), arguments | more, config, candidates)
    return sums


def gated_tail_apply(
    gated: Gated,
    branch: TailTerm,
    shortcut: TailTerm | None,
    activation: Activation,
    coupled: bool,
    tail_coefficients: TailCoefficients,
    tail_needs: TailNeeds,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """See fusedres.ops.gated_tail."""
    x = branch.x
    written = tail_needs.written(branch, shortcut)
    grads = [torch.empty_like(x) if needed else x.new_empty(0) for needed in written]
    names = ("out_ptr", "out_logits_ptr", "out_shortcut_ptr", "out_shortcut_logits_ptr")
    candidates = configs.elementwise(x.shape[1], x.element_size())
    config = choose(candidates)
    arguments = _arguments(branch, shortcut, activation, coupled, config["BLOCK_M"])
    more = {
        "grad_ptr": gated.grad,
        "mask_ptr": gated.gate,
        "coefficients_ptr": tail_coefficients.branch_coefficients,
        "shortcut_coefficients_ptr": tail_coefficients.shortcut_coefficients,
        "coefficients_stride": 4 * _stride(tail_coefficients.branch_coefficients),
        "shortcut_coefficients_stride": 4 * _stride(tail_coefficients.shortcut_coefficients),
        **{name: grad if needed else None for name, grad, needed in zip(names, grads, written, strict=True)},
    }
    launch(gated_tail_apply_kernel, _grid(arguments, x, config), arguments | more, config, candidates)
    return grads[0], grads[1], grads[2], grads[3]
