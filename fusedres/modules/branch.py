"""Runs a residual branch of any layers, with the convolutions in it fused with what stands before them."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fusedres.modules.calls import unusual_input
from fusedres.modules.genuine import touched
from fusedres.modules.norm_act_conv import run_unit, standing_reason


def run_branch(op: str, name: str, branch: nn.Module, x: Tensor) -> Tensor:
    """Return branch(x). A plain nn.Sequential's convolutions, each with a norm and an activation before it, are units.

    Everything else is called, and so is a branch that is observed as a whole, traced or compiled.

    Args:
        op, name: the owner's class and the branch's name in it, for errors.

    Raises: what the layers raise, and see NormActConv.
    """
    if torch.compiler.is_compiling() or unusual_input(x) is not None:
        found: Tensor = branch(x)
        return found
    layers = [(name, branch)]
    if type(branch) is nn.Sequential and touched(name, branch) is None:
        layers = [(f"{name}.{child}", layer) for child, layer in branch._modules.items() if layer is not None]
    position = 0
    while position < len(layers):
        (first, layer), *following = layers[position : position + 3]
        if len(following) == 2 and standing_reason((first, layer), following[0][1], dict(following[1:])) is None:
            (x,), _ = run_unit(op, x, (first, layer), following[0][1], dict(following[1:]))
            position += 3
        else:
            if standing_reason(None, None, {first: layer}) is None:
                (x,), _ = run_unit(op, x, None, None, {first: layer})
            else:
                x = layer(x)
            position += 1
    return x
