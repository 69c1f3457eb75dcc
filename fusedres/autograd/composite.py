"""A residual block as a composition of differentiable torch operators, for gradients of gradients."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from fusedres.autograd.plan import BlockPlan, ConvBN


def composite_block(
    x: Tensor, plan: BlockPlan, params: tuple[Tensor | None, ...], constants: list[Tensor | None]
) -> Tensor:
    """The block's output from its input and parameters; running statistics are neither read nor updated.

    params holds conv weight, BN weight, BN bias of every unit; constants the saved (4, C) state of every unit whose
    statistics are constants, None for the others.
    """

    def conv_bn(h: Tensor, unit: ConvBN, index: int) -> Tensor:
        conv_weight, weight, bias = params[3 * index : 3 * index + 3]
        assert conv_weight is not None
        y = torch.convolution(
            h.to(plan.dtype),
            conv_weight.to(plan.dtype),
            None,
            unit.stride,
            unit.padding,
            unit.dilation,
            False,
            (0, 0),
            unit.groups,
        )
        state = constants[index]
        if state is None:
            return F.batch_norm(y, None, None, weight, bias, True, 0.0, unit.eps)
        normalised = (y.to(state.dtype) - state[0].view(1, -1, 1, 1)) * state[1].view(1, -1, 1, 1)
        if weight is not None:
            normalised = normalised * weight.to(state.dtype).view(1, -1, 1, 1)
        if bias is not None:
            normalised = normalised + bias.to(state.dtype).view(1, -1, 1, 1)
        return normalised.to(y.dtype)

    h = x
    for index, unit in enumerate(plan.units[:-1]):
        h = conv_bn(h, unit, index).relu()
    z = conv_bn(h, plan.units[-1], len(plan.units) - 1)
    if plan.projection is not None:
        return (z + conv_bn(x, plan.projection, len(plan.units))).relu()
    shortcut = x.to(z.dtype)[:, :, :: plan.pad_stride, :: plan.pad_stride]
    return (z + F.pad(shortcut, (0, 0, 0, 0, 0, z.shape[1] - shortcut.shape[1]))).relu()
