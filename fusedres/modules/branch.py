"""Runs a residual branch of any layers, with the convolutions in it fused with what stands before them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fusedres.modules.calls import unusual_input
from fusedres.modules.genuine import is_transparent
from fusedres.modules.norm_act_conv import Named, run_unit, standing_reason
from fusedres.ops._sizes import FLOATING


def run_branch(op: str, name: str, branch: nn.Module, x: Tensor) -> Tensor:
    """Return branch(x). A plain nn.Sequential's convolutions, each with a norm and an activation before it, are units.

    Everything else is called, and so is a branch that is observed as a whole, traced or compiled.

    Args:
        op, name: the owner's class and the branch's name in it, for errors.

    Raises: what the layers raise, and see NormActConv.
    """
    h: Any = x
    if torch.compiler.is_compiling() or unusual_input(x) is not None:
        called: Tensor = branch(x)
        return called
    layers: list[tuple[str, Any]] = [(name, branch)]
    if is_transparent(name, branch):
        layers = [(f"{name}.{child}", layer) for child, layer in branch._modules.items()]
    while layers:
        unit = _unit(layers) if isinstance(h, Tensor) and h.dim() == 4 and h.dtype in FLOATING else None
        if unit is None:
            h = layers.pop(0)[1](h)
            continue
        norm, activation, conv = unit
        (h,), _ = run_unit(f"{op}: {conv[0]}", h, norm, activation, dict([conv]))
        del layers[: 1 if norm is None else 3]
    result: Tensor = h
    return result


def _unit(layers: Sequence[tuple[str, Any]]) -> tuple[Named | None, nn.Module | None, Named] | None:
    """Return norm, activation and convolution that the layers begin with, or a convolution alone; else None."""
    if standing_reason(None, None, dict(layers[:1])) is None:
        return None, None, layers[0]
    if len(layers) > 2 and standing_reason(layers[0], layers[1][1], dict(layers[2:3])) is None:
        return layers[0], layers[1][1], layers[2]
    return None
