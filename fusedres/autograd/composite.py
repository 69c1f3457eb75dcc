"""A residual block as a composition of differentiable torch operators, for gradients of gradients."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from fusedres.autograd.plan import BlockPlan, ConvBN


def conv_bn(
    h: Tensor, unit: ConvBN, params: tuple[Tensor | None, ...], state: Tensor | None, dtype: torch.dtype
) -> Tensor:
    """BatchNorm(conv(h)) of conv weight, BN weight, BN bias; state is that of constant statistics, else None."""
    conv_weight, weight, bias = params
    assert conv_weight is not None
    y = torch.convolution(
        h.to(dtype),
        conv_weight.to(dtype),
        None,
        unit.stride,
        unit.padding,
        unit.dilation,
        False,
        (0, 0),
        unit.groups,
    )
    if state is None:
        return F.batch_norm(y, None, None, weight, bias, True, 0.0, unit.eps)
    normalised = (y.to(state.dtype) - state[0].view(1, -1, 1, 1)) * state[1].view(1, -1, 1, 1)
    if weight is not None:
        normalised = normalised * weight.to(state.dtype).view(1, -1, 1, 1)
    if bias is not None:
        normalised = normalised + bias.to(state.dtype).view(1, -1, 1, 1)
    return normalised.to(y.dtype)


def composite_stem(
    x: Tensor, unit: ConvBN, params: tuple[Tensor | None, ...], state: Tensor | None, dtype: torch.dtype
) -> Tensor:
    """The stem's output as conv_bn's arguments give it; running statistics are neither read nor updated."""
    return F.max_pool2d(conv_bn(x, unit, params, state, dtype).relu(), 3, 2, 1)


def composite_block(
    x: Tensor, plan: BlockPlan, params: tuple[Tensor | None, ...], constants: list[Tensor | None]
) -> Tensor:
    """The block's output from its input and parameters; running statistics are neither read nor updated.

    params holds conv weight, BN weight, BN bias of every unit; constants the saved (4, C) state of every unit whose
    statistics are constants, None for the others.
    """

    def normalised(h: Tensor, unit: ConvBN, index: int) -> Tensor:
        return conv_bn(h, unit, params[3 * index : 3 * index + 3], constants[index], plan.dtype)

    h = x
    for index, unit in enumerate(plan.units[:-1]):
        h = normalised(h, unit, index).relu()
    z = normalised(h, plan.units[-1], len(plan.units) - 1)
    if plan.projection is not None:
        return (z + normalised(x, plan.projection, len(plan.units))).relu()
    shortcut = x.to(z.dtype)[:, :, :: plan.pad_stride, :: plan.pad_stride]
    return (z + F.pad(shortcut, (0, 0, 0, 0, 0, z.shape[1] - shortcut.shape[1]))).relu()
